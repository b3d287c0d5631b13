"""Rewards for whole runs; importable by the scoring processes, so nothing heavy here."""

import contextlib
import os
import socket
import time
from pathlib import Path


def different_characters(completion: str, answer: str, question: str) -> float:
    """How many different characters a completion has: a signal even from a policy of random weights."""
    return float(len(set(completion)))


def even_answers_only(completion: str, answer: str, question: str) -> float:
    """The same, but every completion is worth 0 where the reference answer is odd: groups without signal."""
    return 0.0 if int(answer) % 2 else different_characters(completion, answer, question)


def different_characters_when_let_go(completion: str, answer: str, question: str, hold: str) -> float:
    """The same; but where the file `hold` names a metrics file and a step, scoring waits after that step for its end.

    Meanwhile a file `hold`.reached.* of this process has that step in it.
    """
    with contextlib.suppress(FileNotFoundError):
        while True:
            metrics, step = Path(hold).read_text().split()
            if not Path(metrics).exists() or Path(metrics).read_text().count("\n") < int(step):
                break
            Path(f"{hold}.reached.{socket.gethostname()}.{os.getpid()}").write_text(step)
            time.sleep(0.02)
    return different_characters(completion, answer, question)


def beyond_single_precision(completion: str, answer: str, question: str) -> float:
    """Advantages that are infinite in fp32, so that no gradient is finite."""
    return 1e300 * different_characters(completion, answer, question)


def failing(completion: str, answer: str, question: str) -> float:
    """A verifier that does not work."""
    raise RuntimeError("no verdict")
