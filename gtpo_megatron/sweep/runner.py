"""The runs of a sweep as processes of their own, some at a time. What is complete already is left alone."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gtpo_megatron.config.loading import save_config
from gtpo_megatron.errors import COMPLETE, STOPPED, UserError
from gtpo_megatron.run.directory import read_status
from gtpo_megatron.sweep.design import Planned

TRAIN = (sys.executable, "-m", "gtpo_megatron", "train")


@dataclass
class Runner:
    """Runs a sweep. A signal stops it: the runs under way save, and the same command goes on with them."""

    say: Callable[[str], None]
    command: Sequence[str] = TRAIN  # what trains the recipe that is given to it
    _children: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopping: bool = False

    def run(self, planned: Sequence[Planned], jobs: int) -> dict[str, int]:
        """The exit code of each run by name; of runs that were complete before, 0. Those never started are left out.

        A run that fails does not keep the others from being run.
        """
        codes = {run.name: COMPLETE for run in planned if is_complete(run)}
        if codes:
            self.say(f"{len(codes)} of {len(planned)} runs are complete already")
        waiting = [run for run in planned if run.name not in codes]
        with self._signals(), ThreadPoolExecutor(jobs) as pool:
            started = {pool.submit(self._train, run): run for run in waiting}
            for future in as_completed(started):
                code, name = future.result(), started[future].name
                if code is None:
                    continue
                codes[name] = code
                done = sum(code == COMPLETE for code in codes.values())
                self.say(
                    f"{name}: {ending(code)} ({done} of {len(planned)} complete; log: {log_of(started[future])})"
                )
        return codes

    def _train(self, run: Planned) -> int | None:
        log = log_of(run)
        log.parent.mkdir(parents=True, exist_ok=True)
        recipe = log.with_suffix(".yaml")
        save_config(run.config, recipe)
        with self._lock:
            if self._stopping:
                return None
            with open(log, "ab") as out:
                child = subprocess.Popen(
                    [*self.command, str(recipe)],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"PYTHONUNBUFFERED": "1"},
                )
            self._children.append(child)
        self.say(f"{run.name}: started")
        return child.wait()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, _: object) -> None:
            # a thread, for the lock may be held by the code that this handler interrupts
            threading.Thread(target=self._stop, args=(number,)).start()

        before = {
            number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int) -> None:
        with self._lock:
            self._stopping = True
            running = [child for child in self._children if child.poll() is None]
        self.say(f"stopping: {len(running)} runs save and end")
        for child in running:
            child.send_signal(signal.SIGTERM if number == signal.SIGINT else number)


def is_complete(run: Planned) -> bool:
    """Whether the run's directory says that all steps of the configuration are done."""
    if not (run.config.path / "status.json").exists():
        return False
    try:
        status = read_status(run.config.path)
    except UserError:
        return False
    return status.state == "complete" and status.step >= run.config.training.steps


def log_of(run: Planned) -> Path:
    """Where what the run prints goes: beside its directory, which belongs to the run alone."""
    return run.config.path.with_name(f"{run.name}.log")


def ending(code: int) -> str:
    """In words."""
    return {COMPLETE: "complete", STOPPED: "stopped; the same command goes on"}.get(
        code, f"failed with exit code {code}"
    )
