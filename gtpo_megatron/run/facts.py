"""run.json: on what a run runs. What metrics of seconds mean depends on it; later reports read it without the checkpoint.

Written at each start of the run, for its layout may have changed since the last.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.checks import read_shape
from gtpo_megatron.plan.facts import GPU, gpu_of_device
from gtpo_megatron.plan.layout import HFShape

FACTS = "run.json"


@dataclass(frozen=True)
class RunFacts:
    """World, layout, device and model of a run."""

    world_size: int
    ranks_per_node: int
    parallel: dict[str, Any]  # the configuration's section
    device: str  # as the driver calls a rank's GPU, or "cpu"
    shape: HFShape  # of the model

    @classmethod
    def of(cls, config: RunConfig, world_size: int, device: str) -> "RunFacts":
        """Of the run of `config` that starts here."""
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls(world_size, per_node, config.parallel.model_dump(), device, read_shape(config.model.path))

    @property
    def nodes(self) -> int:
        return -(-self.world_size // self.ranks_per_node)

    @property
    def gpu(self) -> GPU | None:
        """What plan/machines.yaml knows of the device; None of a CPU, and of any GPU that it has not by its exact name."""
        return gpu_of_device(self.device)

    def write(self, run: Path) -> None:
        """Write it into a run's directory, whole or not at all."""
        temporary = run / f".{FACTS}.tmp"
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        text = json.dumps(values | {"shape": dataclasses.asdict(self.shape)}, indent=1)
        temporary.write_text(f"{text}\n", encoding="utf-8")
        temporary.replace(run / FACTS)


def read_facts(run: Path) -> RunFacts:
    """What a run left of it. Raises UserError if there is none (a run of an older version) or it is damaged."""
    path = run / FACTS
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return RunFacts(**values | {"shape": HFShape(**values["shape"])})
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; is {run} the directory of a run, of this version or a later one?"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged ({error}); start the run again, which writes it anew") from error
