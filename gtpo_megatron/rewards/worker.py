"""A scoring process: reads (completion, answer, question), answers ("ok", {term: value}) or ("error", text)."""

import math
import signal
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

from gtpo_megatron.processes import end_with
from gtpo_megatron.rewards.terms import Term, load_term

Reply = tuple[str, Any]
STOP_SIGNALS = (
    signal.SIGUSR1,
    signal.SIGTERM,
)  # Slurm sends them to every process of a step, not to its ranks alone


def main(fd: int, owner: int) -> None:
    """Load the terms that the parent sends, say ("ready", None) or ("error", text), then score until it hangs up.

    Args:
        fd: of a `multiprocessing` connection to the parent.
        owner: process id of the parent, with whose death this process ends, its children included.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _leave_to_parent)
    threading.Thread(target=end_with, args=(owner,), daemon=True).start()
    connection = Connection(fd)
    terms: dict[str, Term] = {}
    for name, kind, function, options in connection.recv():
        try:
            terms[name] = load_term(kind, function, options)
        except BaseException as error:  # a user's module may raise anything, SystemExit included
            connection.send(("error", f"{function or kind}: {_describe(error)}"))
            return
    connection.send(("ready", None))
    while True:
        try:
            completion, answer, question = connection.recv()
        except EOFError:
            return
        connection.send(score(terms, completion, answer, question))


def score(terms: dict[str, Term], completion: str, answer: str, question: str) -> Reply:
    """Every term's value, or what went wrong with the first that has none."""
    values = {}
    for name, term in terms.items():
        try:
            value = float(term(completion, answer, question))
        except BaseException as error:
            return "error", f"{name}: {_describe(error)}"
        if not math.isfinite(value):
            return "error", f"{name}: returned {value}, not a finite number"
        values[name] = value
    return "ok", values


def _describe(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"[:500]
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({frames[-1].filename}:{frames[-1].lineno})" if frames else text


def _leave_to_parent(number: int, _: Any) -> None:
    """The parent finishes its step first, and ends this process. A handler, for a verifier's children would inherit SIG_IGN."""
