"""Writing a policy as a Hugging Face directory: sharded safetensors, index, configuration, tokenizer."""

import json
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gtpo_megatron.errors import UserError
from gtpo_megatron.policy.checkpoint.files import check_free_space, discard
from gtpo_megatron.policy.collective import on_rank_zero, together
from gtpo_megatron.policy.exchange import assets
from gtpo_megatron.policy.model import DTYPES, Policy, export_hf_weights, world_rank

Dtype = Literal["bf16", "fp32"]
SHARD_BYTES = 2 << 30
HF_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def export_hf_checkpoint(
    policy: Policy,
    source: str | Path,
    directory: Path,
    dtype: Dtype,
    *,
    tokenizer: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the policy's weights as a directory that transformers and SGLang load. Collective.

    The directory appears whole or not at all; one of that name is replaced. Rank 0 holds one shard at a time. `source`
    gives configuration and generation settings, `tokenizer` the tokenizer (default: the source's). Raises UserError on
    every rank when the weights are not exactly those that the source names, or writing fails.
    """
    directory = Path(directory)
    partial = directory.with_name(f".{directory.name}.partial-{uuid.uuid4().hex[:8]}")

    def start() -> Path:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        return partial

    partial = on_rank_zero(start)
    try:
        write_hf_checkpoint(policy, source, partial, dtype, tokenizer=tokenizer, shard_bytes=shard_bytes)
        on_rank_zero(lambda: replace_directory(partial, directory))
    except BaseException:
        if world_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def write_hf_checkpoint(
    policy: Policy,
    source: str | Path,
    directory: Path,
    dtype: Dtype,
    *,
    tokenizer: str | Path | None,
    shard_bytes: int,
) -> None:
    """The files of `export_hf_checkpoint`, straight into an existing directory. Collective."""
    writer = _ShardWriter(directory, shard_bytes) if world_rank() == 0 else None
    failure: Exception | None = None
    for name, tensor in export_hf_weights(policy):
        if writer and failure is None:
            try:
                writer.add(name, tensor.to(DTYPES[dtype], copy=True).contiguous())
            except (OSError, SafetensorError, UserError) as error:
                failure = error  # the other ranks are inside the export: raise only when it is drained

    def finish() -> None:
        if writer is None:
            return
        if failure:
            raise failure
        writer.close()
        check_names(writer.names, assets.weight_map(policy), source)
        assets.copy_assets(source, tokenizer or source, directory)
        _state_dtype(directory / "config.json", dtype)

    together(finish)


def replace_directory(partial: Path, directory: Path) -> None:
    """Give a finished directory its name, in place of an earlier one."""
    if directory.exists():
        discard(directory)
    partial.rename(directory)


class _ShardWriter:
    """Collects tensors into safetensors files of a size, and writes the index."""

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        self._directory = directory
        self._limit = shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._bytes = self._total = 0
        self._files: list[tuple[Path, list[str]]] = []
        self.names: set[str] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        if self._bytes and self._bytes + tensor.nbytes > self._limit:
            self._write()
        self._shard[name] = tensor
        self.names.add(name)
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes

    def _write(self) -> None:
        check_free_space(self._directory, self._bytes)
        path = self._directory / f"shard-{len(self._files)}.safetensors"
        save_file(self._shard, path, metadata={"format": "pt"})
        self._files.append((path, list(self._shard)))
        self._shard, self._bytes = {}, 0

    def close(self) -> None:
        """Write the last shard, and give all files the names that transformers looks for."""
        self._write()
        count = len(self._files)
        weight_map = {}
        for number, (path, names) in enumerate(self._files, 1):
            final = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self._directory / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
            (self._directory / assets.INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def stored_names(names: Iterable[str]) -> set[str]:
    """The names of weights, without the rotary buffers that old checkpoints carry along."""
    return {name for name in names if not name.endswith("rotary_emb.inv_freq")}


def check_names(written: set[str], expected: Iterable[str], source: str | Path) -> None:
    """Raise UserError, naming some, where the exported weights are not those that the source has."""
    wanted = stored_names(expected)
    if wanted != written:
        missing, extra = sorted(wanted - written), sorted(written - wanted)
        raise UserError(
            f"{source}: the exported weights are not those of the source: {len(missing)} missing ({', '.join(missing[:3])}), "
            f"{len(extra)} unknown ({', '.join(extra[:3])})"
        )


def _state_dtype(path: Path, dtype: Dtype) -> None:
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key in [k for k in ("dtype", "torch_dtype") if k in config] or ["torch_dtype"]:
        config[key] = HF_DTYPES[dtype]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
