"""Trainer and servers in turn, without servers: recorders of both sides' calls on two gloo ranks."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from gtpo_megatron.errors import UserError
from tests.parallel.pool import RankPool


@dataclass
class Recorder:
    """Writes every call, and its end, into one file of all ranks; may take its time over one, or fail."""

    who: str
    file: Path
    slow: str = ""
    failing: str = ""

    def _call(self, name: str) -> None:
        self._say(name)
        if name == self.slow:
            time.sleep(0.3)
        if name == self.failing:
            raise UserError(f"{self.who} cannot {name}")
        self._say(f"{name} done")

    def _say(self, what: str) -> None:
        with self.file.open("a") as file:
            file.write(f"{self.who}: {what}\n")

    def lend(self) -> None:
        self._call("lend")

    def take_back(self) -> None:
        self._call("take_back")

    def trim(self) -> None:
        self._call("trim")

    def release_memory(self) -> None:
        self._call("release_memory")

    def resume_weights(self) -> None:
        self._call("resume_weights")

    def resume_cache(self) -> None:
        self._call("resume_cache")


def walk(file: Path, turns: list[str], slow: str = "", failing: str = "") -> str:
    """The turns on this rank, one after the other; how they ended."""
    from gtpo_megatron.policy.model import world_rank
    from gtpo_megatron.run.turns import Turns

    rank = world_rank()
    # one of the trainer's ranks is slower than the other
    made = Turns(Recorder(f"rank {rank}", file, slow if rank else "", failing if rank else ""))
    made.follow(None if rank else Recorder("servers", file, slow, failing))
    try:
        for turn in turns:
            made.take(turn)
    except (UserError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return made.turn


@pytest.fixture
def walked(ranks: RankPool, tmp_path: Path) -> Callable[..., tuple[list[str], list[str]]]:
    """What became of the turns on both ranks, and what was called in which order."""

    def run(*args: object) -> tuple[list[str], list[str]]:
        file = tmp_path / "calls"
        return ranks.run(2, walk, file, *args), file.read_text().splitlines()

    return run


def phases(calls: list[str]) -> list[set[str]]:
    """Calls that are under way together: a set ends where a call of another name begins."""
    found: list[tuple[str, set[str]]] = []
    for call in calls:
        name = call.split(": ")[1].removesuffix(" done")
        if not found or found[-1][0] != name:
            found.append((name, set()))
        found[-1][1].add(call)
    return [calls for _, calls in found]


def whole(name: str, *who: str) -> set[str]:
    return {f"{one}: {name}{end}" for one in who for end in ("", " done")}


TRAINER, SERVERS = ("rank 0", "rank 1"), ("servers",)
STEP = [
    whole("trim", *TRAINER),
    whole("resume_cache", *SERVERS),
    whole("release_memory", *SERVERS),
    whole("take_back", *TRAINER),
    whole("lend", *TRAINER),
    whole("resume_weights", *SERVERS),
    whole("trim", *TRAINER),
    whole("resume_cache", *SERVERS),
]


@pytest.mark.parametrize("slow", ["", "lend", "take_back", "trim", "release_memory", "resume_weights"])
def test_a_side_takes_memory_when_the_other_has_given_it_up_on_all_ranks(
    walked: Callable[..., tuple[list[str], list[str]]], slow: str
) -> None:
    turns = ["weights", "sampling", "training", "weights", "weights", "sampling"]
    ended, calls = walked(turns, slow)
    assert ended == ["sampling", "sampling"]
    assert phases(calls) == [whole("lend", *TRAINER), *STEP]


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        (["training"], "after the turn weights comes sampling, not training"),
        (["sampling", "weights"], "after the turn sampling comes training, not weights"),
        (["sampling", "training", "sampling"], "after the turn training comes weights, not sampling"),
    ],
)
def test_turns_come_in_their_order(
    walked: Callable[..., tuple[list[str], list[str]]], turns: list[str], said: str
) -> None:
    ended, _ = walked(turns)
    assert ended == [f"RuntimeError: {said}"] * 2


@pytest.mark.parametrize(
    ("failing", "who", "last"),
    [
        ("release_memory", "servers", "release_memory"),  # the trainer takes nothing
        ("take_back", "rank 1", "take_back"),
        ("resume_weights", "servers", "resume_weights"),
    ],
)
def test_what_fails_on_one_rank_ends_the_turn_on_all(
    walked: Callable[..., tuple[list[str], list[str]]], failing: str, who: str, last: str
) -> None:
    ended, calls = walked(["sampling", "training", "weights"], "", failing)
    assert ended == [f"UserError: {who} cannot {failing}"] * 2
    assert {call.split(": ")[1].removesuffix(" done") for call in phases(calls)[-1]} == {last}
