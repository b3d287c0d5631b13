"""Training checkpoints: `checkpoints/step-000012`, whole or absent, readable in any layout, without unsafe unpickling.

manifest.json      the completion marker: every other file with size and checksum; written last
state.json         TrainState, Adam's step, the schedule, the layout that saved
rng.safetensors    random state of every rank
fp8.safetensors    scales and histories of FP8's delayed scaling (model.fp8.recipe: delayed)
weights/           megatron.core.dist_checkpointing: parameters and optimizer state
config.yaml        the run's resolved configuration
versions.json      package versions
hf/                Hugging Face configuration, tokenizer, names of the weights: what an export needs
"""

import dataclasses
import importlib.metadata
import json
import logging
import platform as machine
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

# after the imports that make megatron.core importable
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from gtpo_megatron import control
from gtpo_megatron.config import RunConfig
from gtpo_megatron.config.loading import save_config
from gtpo_megatron.errors import UserError
from gtpo_megatron.policy.checkpoint import files, scales
from gtpo_megatron.policy.checkpoint import state as tensor_state
from gtpo_megatron.policy.checkpoint.files import DamagedCheckpointError
from gtpo_megatron.policy.collective import for_rank_zero, on_rank_zero, together
from gtpo_megatron.policy.exchange.assets import copy_assets, weight_map
from gtpo_megatron.policy.model import Policy, world_rank
from gtpo_megatron.policy.optimizer import Optimizer

logger = logging.getLogger(__name__)
RANDOM_STATE, SCALING_STATE = "rng.safetensors", "fp8.safetensors"
WRITE_ERRORS = (OSError, CheckpointException, CheckpointingException)
PACKAGES = (
    "gtpo-megatron",
    "torch",
    "megatron-core",
    "megatron-bridge",
    "transformers",
    "transformer-engine",
    "numpy",
    "safetensors",
)


class NonFiniteError(UserError):
    """Weights or optimizer state that hold a NaN or an infinity: there is nothing to save."""


@dataclass(frozen=True)
class TrainState:
    """What the training loop needs to go on, besides policy and optimizer. JSON-able."""

    step: int  # steps done, and so the number of the next one
    weight_version: int
    initial_entropy: float | None  # H_ini (specification, section 4)
    sampler: dict[str, Any]  # PromptSampler.state_dict
    bad_steps: int = 0  # updates skipped in a row


class Checkpointer:
    """Saves and loads the checkpoints of one run. All methods are collective."""

    def __init__(
        self, directory: Path, config: RunConfig, policy: Policy, optimizer: Optimizer, hf_source: str
    ) -> None:
        """`directory` is the run's `checkpoints`; `hf_source` the Hugging Face directory or hub name it started from."""
        self._directory = Path(directory)
        self._config = config
        self._policy = policy
        self._optimizer = optimizer
        self._hf_source = hf_source
        self._queue = AsyncCallsQueue()
        self._pending: tuple[Path, int] | None = None

    def save(self, state: TrainState) -> None:
        """Write a checkpoint; with checkpoint.asynchronous the shards are written while training goes on.

        The weights are copied before it returns, so they may change. Raises UserError on every rank, and leaves nothing
        behind, when the disk has not the room or writing fails; NonFiniteError when there is nothing worth writing. Earlier
        checkpoints stay as they are.
        """
        self.finish()
        tensors, _ = tensor_state.training_state(self._policy, self._optimizer)
        self._refuse_nonfinite(tensors)
        needed = tensor_state.stored_bytes(tensors)

        def start() -> Path:
            files.check_free_space(self._directory, needed)
            partial = files.new_partial(self._directory, state.step)
            (partial / "weights").mkdir()
            return partial

        partial = on_rank_zero(start)
        try:
            rng = _gather_random_state()
            fp8 = scales.merge(control.gather_to_zero(scales.scaling_state(self._policy)) or [])
            for_rank_zero(lambda: self._write_small_files(partial, state, rng, fp8))
            request = tensor_state.begin_save(
                tensors, partial / "weights", asynchronous=self._config.checkpoint.asynchronous
            )
            self._pending = (partial, state.step)
            if self._config.checkpoint.asynchronous:
                self._queue.schedule_async_request(request)
            else:
                request.execute_sync()
                self._complete()
        except (Exception, CheckpointException) as error:  # the latter is a BaseException
            self._abandon(partial, error)

    def check_weights(self) -> None:
        """Raise NonFiniteError on every rank, naming tensors, if the policy's weights are not finite."""
        self._refuse_nonfinite(tensor_state.policy_tensors(self._policy))

    def _refuse_nonfinite(self, tensors: dict[str, Any]) -> None:
        found = control.gather_to_zero(together(lambda: tensor_state.nonfinite_tensors(tensors))) or []
        if names := control.broadcast_from_zero(sorted({name for part in found for name in part})):
            raise NonFiniteError(
                f"{len(names)} tensors of weights or optimizer are not finite (NaN or infinity), e.g. {names[0]}: the "
                "training has diverged, and no checkpoint of it was written. Start again to go on from the newest "
                f"checkpoint in {self._directory}, or anew, with a lower optimizer.lr or optimizer.clip_grad"
            )

    def poll(self) -> None:
        """Publish an asynchronous save if its shards are written; call it once a step."""
        if self._pending:
            self._finalize(blocking=False)

    def finish(self) -> None:
        """Wait for an asynchronous save, and publish it."""
        if self._pending:
            self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        partial, _ = self._pending
        try:
            if self._queue.maybe_finalize_async_calls(blocking=blocking):
                self._complete()
        except (Exception, CheckpointException) as error:  # the latter is a BaseException
            self._abandon(partial, error)

    def _complete(self) -> None:
        """Checksums, shared out over ranks; then manifest, name, `latest`; then old checkpoints go."""
        partial, step = self._pending
        self._pending = None
        finish_files(partial, step)

        def publish() -> None:
            files.publish(partial, step)
            keep = self._config.checkpoint
            files.prune(self._directory, keep.keep_last, keep.keep_every)

        on_rank_zero(publish)

    def _abandon(self, partial: Path, error: BaseException) -> None:
        self._pending = None
        if world_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, WRITE_ERRORS):
            reason = tensor_state.short_reason(error)
            text = f"{partial.parent}: the checkpoint could not be written, and was removed: {reason}"
            raise UserError(text) from error
        raise error

    def _write_small_files(
        self, partial: Path, state: TrainState, rng: dict[str, Tensor], fp8: dict[str, Tensor]
    ) -> None:
        content = {
            "train": dataclasses.asdict(state),
            "adam_step": tensor_state.adam_step(self._optimizer),
            "schedule": self._optimizer.schedule.state_dict(),
            "layout": _layout(self._config),
        }
        (partial / "state.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        save_file(rng, partial / RANDOM_STATE)
        if fp8:
            save_file(fp8, partial / SCALING_STATE)
        save_config(self._config, partial / "config.yaml")
        (partial / "versions.json").write_text(json.dumps(versions(), indent=1), encoding="utf-8")
        tokenizer = self._config.model.tokenizer or self._hf_source
        copy_assets(self._hf_source, tokenizer, partial / "hf", weight_map(self._policy))

    def load_latest(self) -> TrainState | None:
        """Restore the newest whole checkpoint into policy, optimizer, schedule and random generators.

        None if there is no checkpoint at all. A damaged one is an error, or (checkpoint.on_corrupt: previous) a warning
        and the one before is taken; damaged ones alone are an error in any case, never a new start. Nothing of a
        checkpoint is used before all its checksums are verified. In another layout than the saved one, random
        generators keep their seeds.
        """
        candidates = on_rank_zero(lambda: files.list_checkpoints(self._directory))
        for checkpoint in candidates:
            try:
                manifest = verify(checkpoint)
                return self._load(checkpoint, manifest)
            except DamagedCheckpointError as damage:
                if self._config.checkpoint.on_corrupt == "error":
                    raise DamagedCheckpointError(
                        f"{damage}. Remove {checkpoint} to go on from the one before, or set checkpoint.on_corrupt: previous"
                    ) from damage
                if world_rank() == 0:
                    logger.warning("DAMAGED CHECKPOINT, going back to the one before: %s", damage)
        if candidates:
            raise DamagedCheckpointError(
                f"{self._directory}: none of the {len(candidates)} checkpoints is whole (see the warnings above). "
                "Move them away to start the run anew"
            )
        return None

    def _load(self, checkpoint: Path, manifest: dict[str, Any]) -> TrainState:
        content = on_rank_zero(lambda: read_state(checkpoint))
        rng = together(lambda: _read_random_state(checkpoint))
        fp8 = together(
            lambda: _read_tensors(checkpoint / SCALING_STATE) if SCALING_STATE in manifest["files"] else {}
        )
        # read on each rank, told to none
        together(lambda: tensor_state.read_metadata(checkpoint / "weights") and None)
        weights = checkpoint / "weights"
        tensor_state.load_training_state(self._policy, self._optimizer, content["adam_step"], weights)
        scales.set_scaling_state(self._policy, fp8)
        schedule = self._optimizer.schedule
        schedule.num_steps = 0
        schedule.step(increment=content["schedule"]["num_steps"])
        if content["layout"] == _layout(self._config):
            tensor_state.set_random_state(rng)
        elif world_rank() == 0:
            logger.info(
                "%s was saved as %s: random generators keep their seeds", checkpoint, content["layout"]
            )
        return TrainState(**content["train"])


def finish_files(partial: Path, step: int) -> None:
    """Checksum all files, shared out over ranks, and write the manifest that makes the directory whole. Collective."""
    # listed once: with a network file system's caches, ranks that list for themselves may each leave a file to another
    names = on_rank_zero(lambda: files.files_below(partial))
    own = names[world_rank() :: dist.get_world_size()]
    described = control.gather_to_zero(together(lambda: files.describe_and_flush(partial, own)))

    def write() -> None:
        merged = {name: entry for part in described for name, entry in part.items()}
        if merged.keys() != set(names):
            raise UserError(
                f"{partial}: not every file has a checksum: {sorted(set(names) - merged.keys())[:3]}"
            )
        files.write_manifest(partial, step, merged)

    for_rank_zero(write)


def verify(checkpoint: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with its manifest, spread over ranks, and return the manifest. Collective.

    Raises DamagedCheckpointError on every rank, naming the file.
    """
    manifest = on_rank_zero(lambda: files.read_manifest(checkpoint))
    names = sorted(manifest["files"], key=lambda name: -manifest["files"][name]["bytes"])
    together(
        lambda: files.verify_files(
            checkpoint, manifest["files"], names[world_rank() :: dist.get_world_size()]
        )
    )
    return manifest


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint's state.json, whose checksum is verified already."""
    path = checkpoint / "state.json"
    try:
        content = json.loads(path.read_bytes())
        for retired in ("trained_steps", "extra"):  # of the first versions; nothing ever read them
            content["train"].pop(retired, None)
        TrainState(**content["train"])
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{path}: not a training state: {error}") from error


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a checkpoint means."""
    found = {"python": machine.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _layout(config: RunConfig) -> dict[str, Any]:
    return {
        "world_size": dist.get_world_size(),
        **config.parallel.model_dump(mode="json"),
        "distributed_optimizer": config.optimizer.distributed,
    }


def _gather_random_state() -> dict[str, Any]:
    """The random states of all ranks, on rank 0; nothing elsewhere."""
    gathered = control.gather_to_zero(tensor_state.random_state()) or []
    return {f"{rank}.{name}": value for rank, state in enumerate(gathered) for name, value in state.items()}


def _read_random_state(checkpoint: Path) -> dict[str, Any]:
    prefix = f"{world_rank()}."
    tensors = _read_tensors(checkpoint / RANDOM_STATE)
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{path}: not readable: {error}") from error
