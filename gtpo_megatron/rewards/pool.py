"""Scoring in worker processes: a verifier that hangs, raises, dies or returns NaN costs one reward, never the run."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Pipe
from queue import SimpleQueue
from typing import Self

from gtpo_megatron.config import RewardConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.processes import kill_group

Item = tuple[str, str, str]  # completion text, reference answer, question

_log = logging.getLogger(__name__)
_START_TIMEOUT_S = 300.0  # a loaded machine can take a minute to import a user's verifier
_START = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from gtpo_megatron.rewards.worker import main; main(*map(int, sys.argv[2:]))"
_DIFFERENT_WARNINGS = 20  # a verifier may put the completion into its error
_RESERVED = ("mean", "std", "failed")  # metrics of the whole reward


@dataclass(frozen=True)
class Score:
    """What one completion earned."""

    total: float  # weighted sum of the terms; 0 after an error
    terms: dict[str, float]  # unweighted; all 0 after an error
    error: str | None = None


class WorkerError(Exception):
    """The worker gave no answer; it is gone."""


class ScoreBatch:
    """Scores under way, in the order submitted."""

    def __init__(self, futures: list[Future[Score]]) -> None:
        self._futures = futures

    def done(self) -> bool:
        """True once `result` would not wait."""
        return all(future.done() for future in self._futures)

    def result(self) -> list[Score]:
        """Wait for all of them.

        Raises:
            UserError: a worker could not be started again.
        """
        return [future.result() for future in self._futures]


class RewardPool:
    """Worker processes that score completions.

    Workers are fresh interpreters (not forks: the trainer has threads and process groups) that import the terms and
    no torch. Each scores one completion at a time, so that a limit is a completion's own; a worker over the limit is
    killed with its children, and replaced.

    Args:
        config: the terms, the number of workers and their limits.

    Raises:
        UserError: a term cannot be loaded, or two have one name.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._terms = [
            (term.name or term.kind, term.kind, term.function, term.options) for term in config.terms
        ]
        self._weights = {
            name: term.weight for (name, *_), term in zip(self._terms, config.terms, strict=True)
        }
        _check_names([name for name, *_ in self._terms])
        self._idle: SimpleQueue[_Worker | None] = SimpleQueue()
        self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="rewards")
        self._workers: set[_Worker] = set()
        self._lock = threading.Lock()
        self._said: set[str] = set()  # errors
        try:
            for _ in range(config.workers):  # all start at once, then each is waited for
                self._workers.add(_Worker(self._terms))
            for worker in self._workers:
                worker.wait_ready()
                self._idle.put(worker)
        except UserError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, items: Sequence[Item]) -> ScoreBatch:
        """Start scoring (completion, answer, question) triples; the batch's result keeps their order."""
        return ScoreBatch([self._threads.submit(self._score, item) for item in items])

    def check(self, scores: Sequence[Score]) -> None:
        """Judge a step's scores; call it once with all of them.

        Raises:
            UserError: more than `max_failed_share` of them failed.
        """
        errors = [score.error for score in scores if score.error is not None]
        limit = self._config.max_failed_share
        if scores and len(errors) / len(scores) > limit:
            raise UserError(
                f"rewards: {len(errors)} of {len(scores)} completions could not be scored, more than "
                f"rewards.max_failed_share = {limit} allows. One of the errors: {errors[0]}. "
                "Mend the reward term, or raise rewards.timeout_s or rewards.max_failed_share"
            )

    def close(self) -> None:
        """End the workers; batches under way are cancelled. May be called twice."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self._workers):
            worker.stop()
        self._threads.shutdown()  # their workers are dead, so they end
        while self._workers:
            self._workers.pop().kill()

    def _score(self, item: Item) -> Score:
        worker = self._idle.get()
        try:
            worker = worker or self._start_worker()
            kind, value = worker.score(item, self._config.timeout_s)
        except WorkerError as error:
            kind, value = "error", str(error)
            if worker is not None:
                worker.kill()
                self._workers.discard(worker)
            worker = None
        finally:
            self._idle.put(worker)  # None: the next to come starts a new one
        if kind == "error":
            self._say(value, item[0])
            return Score(0.0, dict.fromkeys(self._weights, 0.0), value)
        return Score(math.fsum(self._weights[name] * term for name, term in value.items()), value)

    def _say(self, error: str, completion: str) -> None:
        with self._lock:
            new = error not in self._said and len(self._said) < _DIFFERENT_WARNINGS
            self._said.add(error)
        level = logging.WARNING if new else logging.DEBUG
        _log.log(
            level,
            "reward 0: %s; completion: %.200r (equal ones are counted in reward/failed)",
            error,
            completion,
        )

    def _start_worker(self) -> "_Worker":
        worker = _Worker(self._terms)
        self._workers.add(worker)
        worker.wait_ready()
        return worker


class _Worker:
    """One process and the connection to it."""

    def __init__(self, terms: list[tuple]) -> None:
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _START,
                json.dumps([path or os.getcwd() for path in sys.path]),
                str(theirs.fileno()),
                str(os.getpid()),
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # a group to kill, and no Ctrl-C from the terminal
        )
        theirs.close()
        self._connection.send(terms)

    def wait_ready(self) -> None:
        """Raise UserError unless the worker says that its terms are loaded."""
        try:
            kind, value = self._receive(_START_TIMEOUT_S)
        except WorkerError as error:
            raise UserError(f"rewards.terms: a scoring process did not start: {error}") from None
        if kind == "error":
            raise UserError(
                f"rewards.terms: {value}. A function is named package.module:function and must be importable from the "
                "folder where the run starts, or be installed"
            )

    def score(self, item: Item, timeout_s: float) -> tuple[str, object]:
        """The worker's reply. Raises WorkerError if there is none in time, or the worker ends."""
        try:
            self._connection.send(item)
        except OSError:  # it died idle
            raise WorkerError(self._epitaph()) from None
        return self._receive(timeout_s)

    def stop(self) -> None:
        """Kill the process and its children."""
        kill_group(self._process.pid)

    def kill(self) -> None:
        """Kill, reap, and free the connection, which nobody may be using."""
        self.stop()
        self._process.wait()
        self._connection.close()

    def _receive(self, timeout_s: float) -> tuple[str, object]:
        try:
            if not self._connection.poll(timeout_s):
                raise WorkerError(f"no result within {timeout_s:g} s")
            return self._connection.recv()
        except (EOFError, OSError):
            raise WorkerError(self._epitaph()) from None

    def _epitaph(self) -> str:
        try:
            code = self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            return "the scoring process closed its connection"
        how = (
            f"was killed by signal {-code} ({signal.strsignal(-code)})"
            if code < 0
            else f"exited with status {code}"
        )
        return f"the scoring process {how}"


def _check_names(names: list[str]) -> None:
    for name in names:
        if name in _RESERVED or names.count(name) > 1:
            raise UserError(
                f"rewards.terms[].name: '{name}' is taken; give each term a name of its own, and none of "
                f"{', '.join(_RESERVED)}"
            )
