"""Conversions between Hugging Face directories and Megatron checkpoints, each ending with its proof.

An output is written and proved under a hidden name; only when the proof holds does it get its own. `conversion.json` in
it holds the proof, the checksum list, the peak memory of a rank and the seconds.
"""

import json
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gtpo_megatron.config import ParallelConfig, RunConfig
from gtpo_megatron.config.loading import load_config
from gtpo_megatron.errors import UserError
from gtpo_megatron.policy import platform
from gtpo_megatron.policy.checkpoint import files, state
from gtpo_megatron.policy.checkpoint.checkpointer import (
    Checkpointer,
    TrainState,
    finish_files,
    read_state,
    verify,
    versions,
)
from gtpo_megatron.policy.collective import on_rank_zero
from gtpo_megatron.policy.exchange import assets
from gtpo_megatron.policy.exchange.export import (
    SHARD_BYTES,
    Dtype,
    export_hf_checkpoint,
    replace_directory,
    write_hf_checkpoint,
)
from gtpo_megatron.policy.exchange.proof import (
    Proof,
    hf_dtypes,
    is_megatron,
    open_policy,
    prove,
    refuse_adapters,
    save_proof,
    stored_dtype,
)
from gtpo_megatron.policy.model import build_policy, initialize_parallel, world_rank
from gtpo_megatron.policy.optimizer import build_optimizer

__all__ = [
    "export_hf_checkpoint",
    "hf_to_megatron",
    "megatron_to_hf",
    "reshard",
    "start_ranks",
    "verify_only",
]


def start_ranks(parallel: ParallelConfig) -> None:
    """Join torchrun's ranks (or be the only one) in a layout without data parallelism of its own making."""
    platform.init_process_group()
    size, needed = dist.get_world_size(), parallel.tensor * parallel.pipeline * parallel.context
    if size % needed:
        raise UserError(
            f"{size} processes do not divide into tensor x pipeline = {needed}; start a multiple of it with torchrun"
        )
    initialize_parallel(parallel, seed=0)


def hf_to_megatron(
    source: Path, output: Path, parallel: ParallelConfig, dtype: Dtype, *, logits: bool = True
) -> Proof:
    """Write a Hugging Face checkpoint as a Megatron checkpoint, readable in any layout. Collective.

    Raises UserError, and leaves no output, when the source is not readable or the proof fails.
    """

    if on_rank_zero(lambda: is_megatron(source)):
        raise UserError(f"{source}: is a Megatron checkpoint already")
    on_rank_zero(lambda: hf_dtypes(source))  # is it whole?

    def write(partial: Path) -> None:
        policy = open_policy(source, parallel, dtype)
        tensors = state.policy_tensors(policy)
        needed = state.stored_bytes(tensors)

        def small_files() -> None:
            files.check_free_space(partial, needed)
            (partial / "weights").mkdir()
            (partial / "versions.json").write_text(json.dumps(versions(), indent=1), encoding="utf-8")
            assets.copy_assets(source, source, partial / "hf", assets.weight_map(policy))

        on_rank_zero(small_files)
        state.begin_save(tensors, partial / "weights", asynchronous=False).execute_sync()
        finish_files(partial, step=0)

    return _converted(source, output, write, lambda partial: prove(source, partial, parallel, logits=logits))


def megatron_to_hf(
    source: Path,
    output: Path,
    parallel: ParallelConfig,
    dtype: Dtype | None,
    *,
    logits: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> Proof:
    """Write a Megatron checkpoint, of a training run or of a conversion, as a Hugging Face directory. Collective.

    `dtype` None keeps the stored one. The original checkpoint is not needed. Raises UserError, and leaves no output,
    when the source is damaged or the proof fails.
    """
    _check_megatron(source)

    def write(partial: Path) -> None:
        stored = on_rank_zero(lambda: stored_dtype(source))
        policy = open_policy(source, parallel, stored)
        write_hf_checkpoint(
            policy, source / "hf", partial, dtype or stored, tokenizer=None, shard_bytes=shard_bytes
        )

    return _converted(source, output, write, lambda partial: prove(source, partial, parallel, logits=logits))


def reshard(source: Path, output: Path, parallel: ParallelConfig, *, logits: bool = True) -> Proof:
    """Load a Megatron checkpoint in this layout and write it again as this layout does, optimizer included. Collective.

    Training never needs it: a checkpoint holds whole tensors in pieces, and every layout reads it as it is. It shows
    that a layout reads a checkpoint, and rewrites the files in the number that suits the reading ranks.
    """
    manifest = _check_megatron(source)
    is_training = on_rank_zero(lambda: (source / "state.json").is_file())

    def write(partial: Path) -> None:
        if is_training:
            _reshard_training(source, partial, parallel)
            return
        policy = open_policy(source, parallel, on_rank_zero(lambda: stored_dtype(source)))

        def small_files() -> None:
            (partial / "weights").mkdir()
            for name in manifest["files"]:
                if not name.startswith("weights/"):
                    (partial / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(source / name, partial / name)

        on_rank_zero(small_files)
        tensors = state.policy_tensors(policy)
        state.begin_save(tensors, partial / "weights", asynchronous=False).execute_sync()
        finish_files(partial, step=manifest["step"])

    return _converted(source, output, write, lambda partial: prove(source, partial, parallel, logits=logits))


def _check_megatron(source: Path) -> dict[str, Any]:
    if not on_rank_zero(lambda: is_megatron(source)):
        raise UserError(f"{source}: is a Hugging Face directory, not a Megatron checkpoint")
    on_rank_zero(lambda: refuse_adapters(source))
    return verify(source)


def _reshard_training(source: Path, partial: Path, parallel: ParallelConfig) -> None:
    config: RunConfig = on_rank_zero(lambda: load_config(source / "config.yaml"))
    config = config.model_copy(
        update={
            "parallel": parallel,
            "model": config.model.model_copy(update={"path": str(source / "hf"), "tokenizer": None}),
            "checkpoint": config.checkpoint.model_copy(update={"asynchronous": False}),
        }
    )
    content = on_rank_zero(lambda: read_state(source))
    policy = build_policy(
        config.model,
        parallel,
        config.training,
        distributed_optimizer=config.optimizer.distributed,
        load_weights=False,
    )
    optimizer = build_optimizer(config.optimizer, policy, config.training.steps)
    state.load_training_state(policy, optimizer, content["adam_step"], source / "weights")
    optimizer.schedule.step(increment=content["schedule"]["num_steps"])
    saver = Checkpointer(partial / "training", config, policy, optimizer, config.model.path)
    saver.save(TrainState(**content["train"]))

    def unwrap() -> None:
        (written,) = files.list_checkpoints(partial / "training")
        shutil.copyfile(source / "config.yaml", written / "config.yaml")
        for path in written.iterdir():
            path.rename(partial / path.name)
        shutil.rmtree(partial / "training")
        (partial / files.MANIFEST).unlink()

    on_rank_zero(unwrap)
    finish_files(partial, step=content["train"]["step"])


def verify_only(a: Path, b: Path, parallel: ParallelConfig, *, logits: bool = True) -> Proof:
    """The proof for two existing checkpoints of either kind; nothing is written. Collective."""
    for path in (a, b):
        if on_rank_zero(lambda path=path: is_megatron(path)):
            verify(path)
    return prove(a, b, parallel, logits=logits)


def _converted(
    source: Path, output: Path, write: Callable[[Path], None], proof_of: Callable[[Path], Proof]
) -> Proof:
    started = time.perf_counter()
    partial = output.with_name(f".{output.name}.partial-{uuid.uuid4().hex[:8]}")

    def start() -> Path:
        if output.exists():
            raise UserError(f"{output}: exists already; name a new directory, or remove it")
        partial.mkdir(parents=True)
        return partial

    partial = on_rank_zero(start)
    try:
        write(partial)
        written_s = time.perf_counter() - started
        proof = proof_of(partial)
        measured = _measured(written_s, time.perf_counter() - started - written_s)
        if not proof.holds:
            raise UserError(
                f"{source}: the conversion is wrong, and {output} was not written:\n{proof.summary()}"
            )
        proof = _renamed(proof, partial, output)

        def publish() -> None:
            save_proof(proof, partial / "conversion.json", **measured)
            replace_directory(partial, output)

        on_rank_zero(publish)
        return proof
    except BaseException:
        if world_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _renamed(proof: Proof, partial: Path, output: Path) -> Proof:
    return replace(proof, result=proof.result.replace(str(partial), str(output)))


def _measured(write_s: float, proof_s: float) -> dict[str, Any]:
    """Seconds, and the peak memory of the rank that needed most. Collective."""
    peak = torch.tensor(platform.peak_memory_gib(), dtype=torch.float64, device=platform.device())
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return {
        "seconds_write": round(write_s, 2),
        "seconds_proof": round(proof_s, 2),
        "peak_memory_gib_of_a_rank": round(float(peak), 3),
        "ranks": dist.get_world_size(),
    }
