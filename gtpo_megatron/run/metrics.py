"""The run's metrics: JSON lines always, TensorBoard and wandb by option. Written by one process."""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from gtpo_megatron.config import LoggingConfig
from gtpo_megatron.errors import UserError

Metric = float | int | bool | str | None
METRICS = "metrics.jsonl"
DISCARDED = "discarded.jsonl"  # lines of steps that were lost and made again
_CLOCK = ("time", "tokens_per_second")
log = logging.getLogger(__name__)


class MetricsWriter:
    """Appends one JSON object a step to `<run_dir>/metrics.jsonl`, and passes the numbers on.

    Args:
        run_dir: the run's directory; made if it is not there.
        config: where else the metrics go.

    Raises:
        UserError: wandb is asked for and not installed.
    """

    def __init__(self, run_dir: Path | str, config: LoggingConfig) -> None:
        self._run_dir = Path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self.path = self._run_dir / METRICS
        self._config = config
        self._wandb = _start_wandb(self._run_dir, config) if config.wandb else None
        self._tensorboard = None
        self._draws = config.tensorboard
        self._purge_step: int | None = None
        _drop_partial_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write a step's metrics; on disk's side of the process when this returns.

        Values are numbers, text, or anything that float() takes (a tensor of one element). NaN and infinities become
        null in the JSON lines, which has no spelling for them.
        """
        values = {name: _plain(value) for name, value in metrics.items()}
        finite = {name: None if _is_nonfinite(value) else value for name, value in values.items()}
        line = {"step": step, "time": round(time.time(), 3), **finite}
        self._file.write(f"{json.dumps(line, allow_nan=False)}\n")
        self._file.flush()
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        if self._draws:
            try:
                self._log_tensorboard(step, numbers)
            except OSError as error:  # the record is metrics.jsonl; a run does not end for its curves
                self._draws = False
                log.warning(
                    "%s: cannot be written (%s): no more curves; metrics.jsonl has all figures",
                    self._run_dir / "tensorboard",
                    error.strerror or error,
                )
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def truncate_after(self, step: int) -> None:
        """Move the steps after `step`, which a resumed run will make again, to `discarded.jsonl`.

        Atomic for the metrics; a process that is killed here leaves the lines in both files, and the next moves them again.
        """
        self._file.close()
        lines = read_metrics(self.path)
        kept = [line for line in lines if line["step"] <= step]
        if len(kept) < len(lines):
            discarded = self._run_dir / DISCARDED
            _drop_partial_line(discarded)
            with discarded.open("a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(line)}\n" for line in lines if line["step"] > step)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(line)}\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._close_tensorboard()
        self._purge_step = step + 1

    def close(self) -> None:
        """Flush and close everything. May be called twice."""
        self._file.close()
        self._close_tensorboard()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def _log_tensorboard(self, step: int, numbers: dict[str, float]) -> None:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only one rank writes

            self._tensorboard = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=self._purge_step)
        for name, value in numbers.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()

    def _close_tensorboard(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None


def is_measured(name: str) -> bool:
    """Whether a metric is of clocks and memory, which no two runs share, however alike they train."""
    return name in _CLOCK or name.startswith(("seconds/", "speed/", "memory/"))


def read_metrics(path: Path | str) -> list[dict[str, Metric]]:
    """The lines of a metrics file, oldest first; a last line that was cut short is left out.

    Raises:
        UserError: there is no such file, or a line before the last is not the metrics of a step as JSON.
    """
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is this the directory of a run?") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:  # not UTF-8 is one as well
            raise UserError(f"{path}: line {number} is not JSON ({error}); remove the line") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path}: line {number} is not the metrics of a step; remove the line")
        rows.append(row)
    return rows


def _drop_partial_line(path: Path) -> None:
    """Cut off what a killed process left of a line, so that the next line starts on its own."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _plain(value: Any) -> Metric:
    return value if value is None or isinstance(value, bool | int | float | str) else float(value)


def _is_nonfinite(value: Metric) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _start_wandb(run_dir: Path, config: LoggingConfig) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            "logging.wandb: true, but wandb is not installed: pip install wandb, or set it to false"
        ) from None
    # The id makes a resumed run go on with its own curves. WANDB_MODE=offline works without a network.
    return wandb.init(
        project=config.wandb_project,
        name=run_dir.name,
        id=_wandb_id(run_dir),
        resume="allow",
        dir=str(run_dir),
    )


def _wandb_id(run_dir: Path) -> str:
    path = run_dir / "wandb_id"
    if not path.exists():
        path.write_text(os.urandom(6).hex())
    return path.read_text().strip()
