"""The export of single pipeline stages: together they are the whole export, and plain receivers end with its bits."""

from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from benchmarks.common.receiver import BROADCAST, Receiver
from gtpo_megatron.config import ModelConfig, ParallelConfig, SGLangConfig, TrainingConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.policy.exchange.stage import check_stages
from gtpo_megatron.rollout.sglang.engine import SGLangEngine
from tests.parallel.pool import RankPool

BUCKET_BYTES = 40_000
LAYOUTS = {
    "one": ("qwen3", 1, {}),
    "tp2": ("qwen3", 2, {"tensor": 2}),
    "dp2": ("qwen3", 2, {}),
    "tp2-pp2": ("qwen3", 4, {"tensor": 2, "pipeline": 2}),
    "pp2-vpp2-cp2": ("qwen3", 4, {"pipeline": 2, "virtual_pipeline": 2, "context": 2}),
    "pp4": ("qwen3", 4, {"pipeline": 4}),
    "tied-pp2-dp2": ("qwen2_tied", 4, {"pipeline": 2}),
    "ep2-pp2": ("qwen3_moe", 4, {"expert": 2, "pipeline": 2}),
    "tp2-ep2-dp2": ("qwen3_moe", 4, {"tensor": 2, "expert": 2, "sequence": True}),
}


def send(checkpoint: Path, parallel: ParallelConfig, lora: dict[str, Any] | None) -> dict[str, Any]:
    """One rank's part of two updates; the names that it exported in the last, and on rank 0 what there is to compare."""
    from megatron.core import parallel_state

    from gtpo_megatron.policy.exchange.stage import StageExport
    from gtpo_megatron.policy.model import build_policy, export_hf_weights, initialize_parallel, world_rank
    from gtpo_megatron.run.weights import StageWeights

    exported: list[str] = []
    held: list[str] = []
    stream = StageExport.stream

    def watched(export: StageExport) -> Any:
        exported.clear()
        held.clear()
        for name, tensor in stream(export):
            exported.append(name)
            if not tensor.is_meta:
                held.append(name)
            yield name, tensor

    initialize_parallel(parallel, seed=0)
    model = ModelConfig(path=str(checkpoint), dtype="bf16", lora=lora)
    policy = build_policy(model, parallel, TrainingConfig(steps=1), trained=lora is not None)
    receivers = [Receiver(), Receiver()] if world_rank() == 0 else []
    with ExitStack() as stack:
        stack.enter_context(patch.object(StageExport, "stream", watched))
        engine = stack.enter_context(closing(engine_for(checkpoint, receivers))) if receivers else None
        weights = stack.enter_context(StageWeights(policy, str(checkpoint), BUCKET_BYTES, engine))
        for version in range(2):
            for parameter in (p for module in policy.modules for p in module.parameters()):
                parameter.data.mul_(1.5).add_(0.01)
            weights.publish(version)
        whole = {name: bits(tensor) for name, tensor in export_hf_weights(policy)}
        return {
            "stage": parallel_state.get_pipeline_model_parallel_rank(),
            "exported": exported,
            "held": held,
            "whole": whole if receivers else None,
            "received": [{name: bits(t) for name, t in r.tensors.items()} for r in receivers],
            "names": [receiver.names for receiver in receivers],
            "broadcasts": [receiver.asked[BROADCAST] for receiver in receivers],
            "states": list(engine.status().values()) if engine is not None else [],
        }


def engine_for(checkpoint: Path, receivers: list[Receiver]) -> SGLangEngine:
    config = SGLangConfig(urls=tuple(receiver.url for receiver in receivers))
    return SGLangEngine(config, str(checkpoint), "bf16", checkpoint / "logs", "cpu")


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().copy()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_receivers_hold_the_trainers_bits_and_each_stage_exports_its_own_once(
    layout: str, ranks: RankPool, tiny_checkpoint: Any
) -> None:
    family, world, parallel = LAYOUTS[layout]
    check(ranks.run(world, send, tiny_checkpoint(family), ParallelConfig(**parallel), None))


def test_adapters_arrive_merged(ranks: RankPool, tiny_checkpoint: Any) -> None:
    check(ranks.run(4, send, tiny_checkpoint("qwen3"), ParallelConfig(tensor=2, pipeline=2), {"rank": 4}))


def test_other_replicas_export_nothing(ranks: RankPool, tiny_checkpoint: Any) -> None:
    results = ranks.run(4, send, tiny_checkpoint("qwen3"), ParallelConfig(pipeline=2), None)
    check(results)
    assert [bool(result["exported"]) for result in results] == [True, False, True, False]


def test_a_rank_that_is_gathered_from_holds_no_tensor_of_parts(ranks: RankPool, tiny_checkpoint: Any) -> None:
    sender, other = ranks.run(2, send, tiny_checkpoint("qwen3"), ParallelConfig(tensor=2), None)
    assert sender["held"] == sender["exported"] == other["exported"]
    assert other["held"] and all("norm" in name for name in other["held"])  # each rank has them whole
    assert not any("norm" in name for name in set(other["exported"]) - set(other["held"]))


def check(results: list[dict[str, Any]]) -> None:
    first = results[0]
    assert first["states"] == ["ready", "ready"]
    for names, tensors in zip(first["names"], first["received"], strict=True):
        assert Counter(names) == Counter(list(first["whole"]))
        for name, expected in first["whole"].items():
            assert np.array_equal(tensors[name], expected), name
    assert min(first["broadcasts"]) > 2 * (
        1 + max(result["stage"] for result in results)
    )  # several buckets a stage
    of_stages: dict[int, set[str]] = {}
    for result in results:
        of_stages.setdefault(result["stage"], set()).update(result["exported"])
    assert Counter(name for names in of_stages.values() for name in names) == Counter(list(first["whole"]))


def test_a_weight_of_no_stage_or_of_two_is_named() -> None:
    stored = SimpleNamespace(key_to_filename_map={"a.weight": "f", "b.weight": "f"})
    policy: Any = SimpleNamespace(bridge=SimpleNamespace(hf_pretrained=SimpleNamespace(state=None)))
    policy.bridge.hf_pretrained.state = SimpleNamespace(source=stored)
    one, two = ([(name, torch.empty(1, device="meta"))] for name in stored.key_to_filename_map)
    check_stages(policy, "model", [one, two])
    with pytest.raises(UserError, match="model: .* 1 missing .b.weight"):
        check_stages(policy, "model", [one, []])
    with pytest.raises(UserError, match="model: 1 weights are exported twice: b.weight"):
        check_stages(policy, "model", [one + two, two])
