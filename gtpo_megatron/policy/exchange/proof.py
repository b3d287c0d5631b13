"""The proof that two checkpoints hold the same model: every tensor named, matched and compared, and the logits of both.

A side is a Hugging Face directory or a Megatron checkpoint. Both are brought to the same names by streaming, so that no
more than a rank's part of the policy and one tensor are in memory; the two models run one after the other.
"""

import gc
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from gtpo_megatron import control
from gtpo_megatron.config import ModelConfig, ParallelConfig, TrainingConfig
from gtpo_megatron.config.loading import load_config
from gtpo_megatron.errors import UserError
from gtpo_megatron.policy import platform
from gtpo_megatron.policy.batch import make_micro_batch
from gtpo_megatron.policy.checkpoint import files, state
from gtpo_megatron.policy.checkpoint.safety import read_metadata
from gtpo_megatron.policy.collective import on_rank_zero
from gtpo_megatron.policy.exchange import assets
from gtpo_megatron.policy.exchange.export import Dtype, stored_names
from gtpo_megatron.policy.model import (
    DTYPES,
    Policy,
    build_policy,
    export_hf_weights,
    is_reporting_rank,
    output_weight,
)
from gtpo_megatron.policy.step import run_schedule
from gtpo_megatron.trajectories.record import Trajectory

PROMPTS = (
    "What is 12 + 34? Think step by step.",
    "The quick brown fox jumps over the lazy dog, and then it",
    "def fibonacci(n):\n    return",
    "<reasoning>7 + 8 = 15</reasoning> <answer>15</answer>",
)
LOGIT_TOLERANCE = 1e-4  # of the largest logit; both sides compute in fp32, with weights of the narrower type


@dataclass(frozen=True)
class TensorEntry:
    """One tensor under its Hugging Face name."""

    shape: tuple[int, ...]
    dtype: str
    checksum: str  # XXH3 of its bytes in the narrower type of both sides


@dataclass(frozen=True)
class Side:
    """One of the two checkpoints."""

    path: str
    kind: Literal["hugging_face", "megatron"]
    tensors: dict[str, TensorEntry]
    logits: list[Tensor] | None  # [tokens, vocabulary] of each prompt


@dataclass(frozen=True)
class Proof:
    """What was compared, and how it came out."""

    source: str
    result: str
    tensors: int
    parameters: int
    missing: list[str]  # in the result
    extra: list[str]
    different: list[str]  # shape or bits
    logits_compared: int
    max_logit_difference: float | None
    max_logit: float | None
    checksums: dict[str, dict[str, Any]]

    @property
    def holds(self) -> bool:
        """Whether both sides are the same model."""
        if self.missing or self.extra or self.different or not self.tensors:
            return False
        if self.max_logit_difference is None:
            return True
        return self.max_logit_difference <= LOGIT_TOLERANCE * max(1.0, self.max_logit)

    def summary(self) -> str:
        """A few lines for a person."""
        lines = [
            f"tensors      {self.tensors} matched by name, shape and bits ({self.parameters:,} parameters)"
            if not (self.missing or self.extra or self.different)
            else f"tensors      MISSING {_some(self.missing)}; EXTRA {_some(self.extra)}; DIFFERENT {_some(self.different)}"
        ]
        if self.max_logit_difference is None:
            lines.append("logits       not compared (--no-logits)")
        else:
            lines.append(
                f"logits       largest difference {self.max_logit_difference:.3g} over {self.logits_compared} values "
                f"on {len(PROMPTS)} prompts (largest logit {self.max_logit:.3g})"
            )
        return "\n".join([*lines, f"proof        {'holds' if self.holds else 'FAILS'}"])


def _some(names: list[str]) -> str:
    return f"{len(names)}" + (f" ({', '.join(names[:3])})" if names else "")


def is_megatron(path: Path) -> bool:
    """Whether a directory is one of our Megatron checkpoints. Raises UserError if it is no checkpoint at all."""
    if (path / files.MANIFEST).is_file() or (path / "weights" / ".metadata").is_file():
        return True
    if (path / "config.json").is_file():
        return False
    raise UserError(
        f"{path}: neither a Megatron checkpoint ({files.MANIFEST}) nor a Hugging Face directory (config.json)"
    )


def stored_dtype(path: Path) -> Dtype:
    """The type that a checkpoint's weights are stored in: bf16 if all of them are, else fp32."""
    if is_megatron(path):
        stored = read_metadata(path / "weights").state_dict_metadata
        model = [v for k, v in stored.items() if not k.startswith("optimizer.") and hasattr(v, "properties")]
        narrow = all(v.properties.dtype == torch.bfloat16 for v in model)
    else:
        narrow = all(name == "BF16" for name in hf_dtypes(path).values())
    return "bf16" if narrow else "fp32"


def refuse_adapters(path: Path) -> None:
    """Raise UserError for a checkpoint of a LoRA run: it holds the adapters without their base."""
    file = path / "config.yaml"
    if file.is_file() and (lora := load_config(file).model.lora) is not None:
        raise UserError(
            f"{path}: holds LoRA adapters alone (rank {lora.rank}), not a model. The end of their run writes the merged "
            "model to hf/ and the adapters to adapter/ in the run's directory; start it again to get there, or with "
            "training.steps at the step of this checkpoint"
        )


def open_policy(path: Path, parallel: ParallelConfig, dtype: Dtype, *, load: bool = True) -> Policy:
    """A frozen policy of a checkpoint of either kind, in this layout. Collective."""
    megatron = is_megatron(path)
    refuse_adapters(path)
    model = ModelConfig(path=str(path / "hf" if megatron else path), dtype=dtype)
    policy = build_policy(
        model, parallel, TrainingConfig(steps=1), trained=False, load_weights=load and not megatron
    )
    if load and megatron:
        state.load_policy(policy, path / "weights")
    return policy


def prove(source: Path, result: Path, parallel: ParallelConfig, *, logits: bool = True) -> Proof:
    """Compare two checkpoints of either kind. Collective; the proof is the same on every rank."""
    dtypes = on_rank_zero(lambda: [stored_dtype(source), stored_dtype(result)])
    narrow: Dtype = "bf16" if "bf16" in dtypes else "fp32"
    prompts = on_rank_zero(lambda: _prompt_ids(source, result)) if logits else None
    a = _side(source, parallel, narrow, prompts)
    b = _side(result, parallel, narrow, prompts)
    return on_rank_zero(lambda: _compare(a, b))


def save_proof(proof: Proof, path: Path, **more: Any) -> None:
    """Write the proof as JSON, checksum list included."""
    path.write_text(
        json.dumps(asdict(proof) | {"holds": proof.holds} | more, indent=1) + "\n", encoding="utf-8"
    )


def _compare(a: Side, b: Side) -> Proof:
    names = sorted(a.tensors.keys() & b.tensors.keys())
    same = {
        n
        for n in names
        if a.tensors[n].shape == b.tensors[n].shape and a.tensors[n].checksum == b.tensors[n].checksum
    }
    difference = largest = None
    count = 0
    if a.logits is not None and b.logits is not None:
        difference = max(float((x - y).abs().max()) for x, y in zip(a.logits, b.logits, strict=True))
        largest = max(float(x.abs().max()) for x in a.logits)
        count = sum(x.numel() for x in a.logits)
        difference = difference if np.isfinite(difference) else float("inf")
    return Proof(
        source=f"{a.path} ({a.kind})",
        result=f"{b.path} ({b.kind})",
        tensors=len(names),
        parameters=sum(int(np.prod(a.tensors[n].shape)) for n in names),
        missing=sorted(a.tensors.keys() - b.tensors.keys()),
        extra=sorted(b.tensors.keys() - a.tensors.keys()),
        different=[n for n in names if n not in same],
        logits_compared=count,
        max_logit_difference=difference,
        max_logit=largest,
        checksums={
            n: {
                "shape": list(a.tensors[n].shape),
                "dtypes": [a.tensors[n].dtype, b.tensors[n].dtype],
                "source": a.tensors[n].checksum,
                "result": b.tensors[n].checksum,
            }
            for n in names
        },
    )


def _side(path: Path, parallel: ParallelConfig, narrow: Dtype, prompts: list[list[int]] | None) -> Side:
    if not is_megatron(path):
        return on_rank_zero(lambda: _hf_side(path, narrow, prompts))
    stored = stored_dtype(path)
    policy = open_policy(path, parallel, "fp32" if prompts else stored)
    tensors = {name: _entry(tensor.to(DTYPES[stored]), narrow) for name, tensor in export_hf_weights(policy)}
    for chunk in policy.chunks:
        round_weights(chunk, narrow)
    logits = policy_logits(policy, parallel, prompts) if prompts else None
    del policy
    gc.collect()
    return Side(str(path), "megatron", tensors, logits)


def _hf_side(path: Path, narrow: Dtype, prompts: list[list[int]] | None) -> Side:
    tensors = {name: _entry(tensor, narrow) for name, tensor in _hf_tensors(path)}
    return Side(str(path), "hugging_face", tensors, hf_logits(path, prompts, narrow) if prompts else None)


def round_weights(model: nn.Module, dtype: Dtype) -> None:
    """Round a model's weights to a type that it is stored in, whatever it computes in."""
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.to(DTYPES[dtype]))


def _entry(tensor: Tensor, narrow: Dtype) -> TensorEntry:
    bits = tensor.to(DTYPES[narrow]).contiguous().view(torch.uint8 if tensor.dim() else torch.int8)
    return TensorEntry(
        tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), xxhash.xxh3_128_hexdigest(bits.numpy())
    )


def hf_dtypes(path: Path) -> dict[str, str]:
    """Name and safetensors type of every tensor of a Hugging Face directory, from the headers of its files.

    Raises UserError when a file is missing or cut short, or the index and the files disagree.
    """
    return {name: file.get_slice(name).get_dtype() for name, file in _hf_entries(path)}


def _hf_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a Hugging Face directory, one at a time."""
    for name, file in _hf_entries(path):
        yield name, file.get_tensor(name)


def _hf_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Every tensor's name, and the open file that holds it; the index and the files must agree."""
    index = path / assets.INDEX
    found = {}
    try:
        stated = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else None
        for name in sorted(set(stated.values()) if stated else {p.name for p in path.glob("*.safetensors")}):
            with safe_open(path / name, framework="pt") as file:
                for key in sorted(stored_names(file.keys())):
                    found[key] = name
                    yield key, file
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a readable safetensors checkpoint: {error}") from error
    if not found:
        raise UserError(f"{path}: no *.safetensors files")
    if stated is not None and {k: v for k, v in stated.items() if k in stored_names(stated)} != found:
        raise UserError(f"{index}: the index does not name the tensors that the files hold")


def _prompt_ids(source: Path, result: Path) -> list[list[int]]:
    """Token ids of the fixed prompts; both sides' tokenizers must give the same."""
    ids = []
    for path in (source, result):
        folder = path / "hf" if is_megatron(path) else path
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids.append([tokenizer(prompt)["input_ids"] for prompt in PROMPTS])
    if ids[0] != ids[1]:
        raise UserError(f"{source} and {result}: their tokenizers give different ids for {PROMPTS[0]!r}")
    return ids[0]


@torch.no_grad()
def hf_logits(path: Path, prompts: list[list[int]], narrow: Dtype = "fp32") -> list[Tensor]:
    """[tokens, vocabulary] of each prompt by transformers in fp32, its weights rounded to `narrow`.

    Raises UserError if transformers would load other weights than those in the directory.
    """
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    wrong = {key: sorted(map(str, names)) for key, names in info.items() if names and key != "error_msgs"}
    if wrong or info.get("error_msgs"):
        raise UserError(f"{path}: transformers does not load it as it is: {wrong or info['error_msgs']}")
    model.eval()
    round_weights(model, narrow)
    return [model(torch.tensor([ids])).logits[0].float() for ids in prompts]


@torch.no_grad()
def policy_logits(policy: Policy, parallel: ParallelConfig, prompts: list[list[int]]) -> list[Tensor] | None:
    """[tokens, vocabulary] of each prompt by the policy, on rank 0 (None elsewhere). Collective."""
    batches = [
        make_micro_batch([_as_trajectory(ids)], [0], alignment=policy.alignment, device=platform.device())
        for ids in prompts
    ]

    def logits(batch: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
        rows = (
            gather_from_sequence_parallel_region(hidden[0]) if policy.config.sequence_parallel else hidden[0]
        )
        local = (rows.float() @ output_weight(policy.last_stage).float().T).contiguous()
        group = parallel_state.get_tensor_model_parallel_group()
        parts = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(parts, local, group=group)
        whole = torch.cat(parts, dim=-1)[:, : policy.vocab_size].cpu()
        one = torch.ones((), dtype=torch.int, device=hidden.device)
        return hidden.sum() * 0, one, whole

    outputs = run_schedule(policy, batches, logits, forward_only=True)
    # the replicas have the same: the first of each replica's last stages speaks
    speaks = is_reporting_rank() and parallel_state.get_data_parallel_rank() == 0
    gathered = control.gather_to_zero(outputs if speaks else None)
    if gathered is None:
        return None
    found = next(part for part in gathered if part)
    return [whole[: len(ids)] for whole, ids in zip(found, prompts, strict=True)]


def _as_trajectory(ids: list[int]) -> Trajectory:
    tokens = np.asarray(ids, np.int32)
    return Trajectory(
        step=0,
        group=0,
        index=0,
        prompt_id="",
        prompt_ids=tokens[:1],
        token_ids=tokens[1:],
        logprobs=np.zeros(len(tokens) - 1, np.float32),
        token_versions=np.zeros(len(tokens) - 1, np.int32),
        finish_reason="data",
    )
