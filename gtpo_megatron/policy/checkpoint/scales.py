"""What FP8's delayed scaling remembers, in checkpoints: scales and histories of largest values, as plain tensors.

They are named by layer, module and direction, not by rank: Transformer Engine takes the maximum over all ranks that share
a layer before it makes a scale, so that all of them hold the same, and a checkpoint can be read in another layout. Its own
`_extra_state` is a pickle, which it refuses to load by default.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_recipe
from torch import Tensor, nn

from gtpo_megatron.policy.model import Policy, unwrap

log = logging.getLogger(__name__)
DIRECTIONS = ("scaling_fwd", "scaling_bwd")
SCALE, HISTORY = "scale", "amax_history"
TENSORS_OF_A_PRODUCT = 3  # forward: input, weight, output


def scaling_state(policy: Policy) -> dict[str, Tensor]:
    """On the CPU, of the layers on this rank that have run: scales [n] and histories [length, n], by name.

    Empty with other recipes, whose scales come from the values themselves.
    """
    return {
        f"{name}.{direction}.{what}": getattr(module.fp8_meta[direction], what).detach().cpu().clone()
        for name, module in _scaled_modules(policy)
        for direction in DIRECTIONS
        if direction in module.fp8_meta
        for what in (SCALE, HISTORY)
    }


def merge(states: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The states of several ranks as one. The newest row of a history is what each rank has seen since the last update."""
    merged: dict[str, Tensor] = {}
    for name, value in (item for state in states for item in state.items()):
        merged[name] = torch.maximum(merged[name], value) if name in merged else value
    return merged


def set_scaling_state(policy: Policy, state: Mapping[str, Tensor]) -> None:
    """Put back what `scaling_state` gave, before or after the first pass.

    Layers that it lacks, or that have other sizes (the experts of another expert parallelism), begin anew, with a line in
    the log.
    """
    if not _is_delayed(policy):
        return
    recipe, anew = get_fp8_recipe(policy.config), []
    for name, module in _scaled_modules(policy):
        stored = {key: state.get(f"{name}.{key}") for key in _keys()}
        products = getattr(module, "num_gemms", 1)
        size = products * TENSORS_OF_A_PRODUCT
        if any(value is None for value in stored.values()) or len(stored[f"scaling_fwd.{SCALE}"]) != size:
            anew.append(name)
            continue
        module.fp8_meta["num_gemms"], module.fp8_meta["recipe"] = products, recipe
        module.init_fp8_meta_tensors(recipe)  # keeps tensors that a pass has made already
        for key, value in stored.items():
            direction, what = key.split(".")
            getattr(module.fp8_meta[direction], what).copy_(value)
    if anew:
        log.warning(
            "model.fp8.recipe: delayed: the checkpoint has no scales for %d modules of this layout (%s); they begin anew",
            len(anew),
            anew[0],
        )


def _keys() -> list[str]:
    return [f"{direction}.{what}" for direction in DIRECTIONS for what in (SCALE, HISTORY)]


def _is_delayed(policy: Policy) -> bool:
    return bool(policy.config.fp8) and policy.config.fp8_recipe == "delayed"


def _scaled_modules(policy: Policy) -> Iterator[tuple[str, Any]]:
    """Products of this rank's layers that scale by history, by a name that holds in every layout."""
    if not _is_delayed(policy):
        return
    for chunk in policy.chunks:
        for layer in unwrap(chunk).decoder.layers:
            for name, module in layer.named_modules():
                if _is_product(module):
                    yield f"layer{layer.layer_number}.{name}", module


def _is_product(module: nn.Module) -> bool:
    """Whether it is one of Transformer Engine's linears; its attention has `fp8_meta` too, and computes in bf16 here."""
    return hasattr(module, "fp8_meta") and (hasattr(module, "weight_names") or hasattr(module, "num_gemms"))
