"""Long-lived worker processes that act as gloo ranks, forked from one that has imported torch and Megatron-Core."""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import psutil

TIMEOUT_S = 600
# Groups of jobs that are done are not all freed, and each keeps a thread of gloo's that polls: a thousand of them took
# both cores of a small machine. Workers with more threads than this make room for new ones.
THREADS = 150
IMPORTED = "tests.parallel.imported"  # by the process that workers are forked from


def imported_context(imported: str = IMPORTED) -> BaseContext:
    """Starts processes that have imported torch and Megatron-Core: by a fork, in 0.1 s, where a spawned one needs 7 s.

    On a machine with GPUs it spawns them, since a forked process cannot use a GPU that its parent has seen.
    """
    if os.path.exists("/dev/nvidiactl"):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([imported])
    return context


class RankPool:
    """`run(world_size, function, *args)` calls a module-level function on that many ranks and returns their results.

    `prepare`, a module-level function, is called once in each worker before any job, and before Megatron-Core is imported.
    `imported` is what workers are forked from, where there is nothing to prepare.
    """

    def __init__(self, prepare: Callable[[], None] | None = None, imported: str = IMPORTED) -> None:
        self._prepare = prepare
        self._context = multiprocessing.get_context("spawn") if prepare else imported_context(imported)
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results by rank. An exception on any rank is raised here with the ranks' tracebacks."""
        return [
            pickle.loads(result) for result in self.run_pickled(world_size, pickle.dumps((function, args)))
        ]

    def run_pickled(self, world_size: int, job: bytes) -> list[bytes]:
        """`run` of what nobody but the ranks takes out of its pickle, which may import Megatron-Core."""
        while len(self._workers) < world_size:
            self._start()
        with tempfile.TemporaryDirectory() as directory:
            for rank in range(world_size):
                self._workers[rank][1].send((rank, job, world_size, os.path.join(directory, "store")))
            answers = self._collect(world_size)
        failures = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failures:
            self.close()  # a rank that failed may have left the others inside a collective
            raise AssertionError("\n".join(failures))
        if max(psutil.Process(process.pid).num_threads() for process, _ in self._workers) > THREADS:
            self.close()
        return [value for _, value in answers]

    def _collect(self, world_size: int) -> list[tuple[bool, Any]]:
        pending = {self._workers[rank][1]: rank for rank in range(world_size)}
        answers: list[tuple[bool, Any]] = [
            (False, "no answer: another rank failed, or a deadlock")
        ] * world_size
        failed = False
        while pending:
            # once a rank has failed, the others may wait for it in a collective for ever
            ready = multiprocessing.connection.wait(list(pending), timeout=10 if failed else TIMEOUT_S)
            if not ready:
                break
            for connection in ready:
                rank = pending.pop(connection)
                try:
                    answers[rank] = connection.recv()
                except EOFError:
                    answers[rank] = (False, "the worker process died")
                failed = failed or not answers[rank][0]
        return answers

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._prepare), daemon=True)
        process.start()
        theirs.close()
        self._workers.append((process, ours))

    def close(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers.clear()


class DetachedPool:
    """A RankPool in a process of its own, whose workers are forked from one that has imported another module: a process can
    fork its workers from one such server only. `packages` is a folder of what that module imports, which this process does not
    see. Non-daemonic, for it has children: `close` it.
    """

    def __init__(self, imported: str, packages: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_relay, args=(theirs, imported, packages))
        self._process.start()
        theirs.close()

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """As of RankPool."""
        try:
            self._connection.send((world_size, pickle.dumps((function, args))))
            done, found = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise AssertionError("the pool's process was killed") from error
        if not done:
            raise AssertionError(found)
        return [pickle.loads(result) for result in found]

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def _relay(connection: Connection, imported: str, packages: Path) -> None:
    sys.path.append(str(packages))  # workers take their path from here
    pool = RankPool(imported=imported)
    try:
        while True:
            world_size, job = connection.recv()
            try:
                answer = True, pool.run_pickled(world_size, job)
            except AssertionError as error:
                answer = False, str(error)
            connection.send(answer)
    except EOFError:
        pool.close()


def _serve(connection: Connection, prepare: Callable[[], None] | None) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    while True:
        try:
            rank, job, world_size, store = connection.recv()
        except EOFError:
            return
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
            dist.barrier()  # a rank whose job is short would leave while another still connects to it
            function, args = pickle.loads(job)
            connection.send((True, pickle.dumps(function(*args))))
        except BaseException:
            connection.send((False, traceback.format_exc()))
        finally:
            _leave()


def _leave() -> None:
    """Forget the process groups of the job, Megatron's included."""
    import torch.distributed as dist

    forget_model()
    if dist.is_initialized():
        dist.destroy_process_group()


def forget_model() -> None:
    """Forget Megatron's process groups, and what Transformer Engine would reduce over them after a later model's passes."""
    if "megatron.core.parallel_state" in sys.modules:
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
    if "transformer_engine.pytorch.quantization" in sys.modules:
        sys.modules["transformer_engine.pytorch.quantization"].FP8GlobalStateManager.reset()
