"""Traces of training, by torch.profiler, of the steps and ranks that `training.profile` names."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gtpo_megatron.config import ProfileConfig

TRACES = "profile"  # in the run's directory
log = logging.getLogger(__name__)


@contextmanager
def traced(config: ProfileConfig, run: Path, step: int, rank: int) -> Iterator[None]:
    """Trace what is done inside, if this step and rank are asked for, into `<run>/profile/step-N-rank-R.json.gz`.

    A trace that cannot be written is said, and ends no run. `step` counts from 1, as metrics do.
    """
    if step not in config.steps or rank not in config.ranks:
        yield
        return
    from torch.profiler import profile

    with profile() as trace:  # of all that torch can trace here: the processor, and CUDA where there is a GPU
        yield
    path = run / TRACES / f"step-{step:08d}-rank-{rank}.json.gz"
    partial = path.with_name(f".{path.name.removesuffix('.json.gz')}.partial.json.gz")
    try:
        path.parent.mkdir(exist_ok=True)
        trace.export_chrome_trace(str(partial))
        partial.replace(path)
        log.info("step %d: traced to %s", step, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        log.warning("step %d: %s could not be written: %s", step, path, error)
