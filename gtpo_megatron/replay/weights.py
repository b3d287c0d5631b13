"""The weights that a run had before a step: its start, or the nearest checkpoint with the steps in between trained again."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.trajectories.store import TrajectoryStore

NAME = "again"


def nearest_checkpoint(run_dir: Path, step: int) -> tuple[int, Path | None]:
    """(steps done, directory) of the run's newest checkpoint at or before a number of steps; (0, None): its start."""
    found = {
        int(manifest.parent.name.removeprefix("step-")): manifest.parent
        for manifest in (run_dir / "checkpoints").glob("step-*/manifest.json")
    }
    done = max((number for number in found if number <= step), default=0)
    return done, found.get(done)


def weights_after(
    run_dir: Path, config: RunConfig, steps: int, scratch: Path, say: Callable[[str], None]
) -> Path:
    """A Hugging Face directory of the weights after `steps` steps of a run. The run itself is only read.

    Steps between the nearest checkpoint and that one are trained again from the stored batches, by this program's own
    training, on one process: with the layout of the run the weights are the same bits, with another they round otherwise.

    Raises:
        UserError: a batch that is needed is not stored, or the model is not there.
    """
    if steps == 0:
        say(f"weights: {config.model.path}, as the run began")
        return Path(config.model.path)
    done, checkpoint = nearest_checkpoint(run_dir, steps)
    where = checkpoint or f"the start ({config.model.path})"
    say(f"weights: {where}" + (f", {steps - done} steps trained again" if steps > done else ""))
    copy = _copy(run_dir, config, range(done, steps), checkpoint, scratch)
    return _train(copy, steps, scratch / "hf")


def _copy(
    run_dir: Path, config: RunConfig, batches: range, checkpoint: Path | None, scratch: Path
) -> RunConfig:
    """A quiet copy of the run on one process, with the checkpoint and the batches that it needs."""
    source = TrajectoryStore(run_dir / "trajectories")
    for batch in batches:
        if not source.path(batch).is_file():
            raise UserError(
                f"{source.path(batch)}: not stored, and step {batch + 1} has to be trained again to get to the step asked for"
            )
    values: dict[str, Any] = config.model_dump(mode="json")
    values |= {
        "name": NAME,
        "dir": str(scratch),
        "parallel": {},
        "evaluation": {},
        "alarm": {"action": "off"},
    }
    values["logging"] = {"tensorboard": False, "wandb": False, "progress": "off", "seen": "off"}
    values["checkpoint"] = {"export_hf": False}
    values["rollout"] |= {
        "engine": "embedded",
        "placement": "apart",
        "staleness": 0,
        "oversample": 1.0,
        "sglang": {},
    }
    values["optimizer"] |= {"distributed": False, "offload": False}
    copy = RunConfig.model_validate(values)
    folder = scratch / NAME / "trajectories"
    folder.mkdir(parents=True)
    for batch in batches:
        shutil.copyfile(source.path(batch), folder / source.path(batch).name)
    if checkpoint is not None:
        shutil.copytree(checkpoint, scratch / NAME / "checkpoints" / checkpoint.name)
    return copy


def _train(config: RunConfig, steps: int, target: Path) -> Path:
    from gtpo_megatron.policy.exchange.export import export_hf_checkpoint
    from gtpo_megatron.run.batches import Batches
    from gtpo_megatron.run.run import Run
    from gtpo_megatron.train import dealt, train_on

    with Run(config) as run, Batches(run) as batches:
        while run.step < steps:
            train_on(run, *dealt(run, batches.next()))
            run.advance()
        export_hf_checkpoint(
            run.policy, config.model.path, target, config.model.dtype, tokenizer=config.model.tokenizer
        )
    return target
