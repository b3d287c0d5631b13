"""The verbs between ranks: what arrives where, and that an error of one rank ends all of them, with its own words."""

import sys
import threading
from typing import Any

import pytest

from gtpo_megatron.control import RankError
from gtpo_megatron.errors import UserError
from tests.parallel.pool import RankPool


class DiskError(UserError):
    """A kind of error that a caller tells from others."""


class Unpicklable(Exception):
    """Holds what cannot travel."""

    def __init__(self) -> None:
        super().__init__("of no use elsewhere")
        self.lock = threading.Lock()


def rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def agreed(flags: tuple[bool, ...]) -> tuple[int, str] | None:
    from gtpo_megatron import control

    found = control.agree(flags[rank()], f"said by {rank()}")
    return found and (found.rank, found.text)


@pytest.mark.parametrize("world", [1, 3])
def test_ranks_agree_on_the_first_flag(ranks: RankPool, world: int) -> None:
    assert ranks.run(world, agreed, (False,) * world) == [None] * world
    for first in range(world):
        flags = tuple(place >= first for place in range(world))
        assert ranks.run(world, agreed, flags) == [(first, f"said by {first}")] * world


def cut_text() -> str:
    from gtpo_megatron import control

    return control.agree(rank() == 1, "é" * 5000).text


def test_a_long_text_is_cut_between_letters(ranks: RankPool) -> None:
    texts = ranks.run(2, cut_text)
    assert texts == ["é" * 1024] * 2


def raised(kind: str, where: tuple[int, ...]) -> tuple[str, str]:
    from gtpo_megatron.policy.collective import together

    def action() -> int:
        if rank() in where:
            raise {
                "user": DiskError(f"full on {rank()}"),
                "file": FileNotFoundError(2, "No such file", "rows.jsonl"),
                "fault": Unpicklable(),
            }[kind]
        return rank()

    try:
        return "", str(together(action))
    except Exception as error:
        return type(error).__name__, str(error)


def test_an_error_of_one_rank_is_raised_on_all(ranks: RankPool) -> None:
    assert ranks.run(3, raised, "user", ()) == [("", "0"), ("", "1"), ("", "2")]
    assert ranks.run(3, raised, "user", (1, 2)) == [("DiskError", "full on 1")] * 3
    assert ranks.run(3, raised, "file", (2,)) == [("UserError", "rows.jsonl: No such file")] * 3
    own, other = ("Unpicklable", "of no use elsewhere"), "rank 1: Unpicklable: of no use elsewhere"
    assert ranks.run(3, raised, "fault", (1,)) == [
        (RankError.__name__, other),
        own,
        (RankError.__name__, other),
    ]


def moved(parts: list[Any]) -> tuple[Any, Any, Any, Any]:
    from gtpo_megatron import control
    from gtpo_megatron.policy.collective import for_rank_zero, on_rank_zero

    first = rank() == 0
    return (
        control.scatter(parts if first else None),
        control.gather_to_zero(("from", rank())),
        control.broadcast_from_zero(parts[-1] if first else "another"),
        (for_rank_zero(lambda: "mine"), on_rank_zero(lambda: rank())),
    )


@pytest.mark.parametrize("world", [1, 3])
def test_each_rank_gets_its_own(ranks: RankPool, world: int) -> None:
    parts = [{"rank": place, "data": b"x" * 1000 * place} for place in range(world)]
    everything = [("from", place) for place in range(world)]
    found = ranks.run(world, moved, parts)
    assert [own for own, *_ in found] == parts
    assert [gathered for _, gathered, *_ in found] == [everything] + [None] * (world - 1)
    assert [told for *_, told, _ in found] == [parts[-1]] * world
    assert [last for *_, last in found] == [("mine", 0)] + [(None, 0)] * (world - 1)


def largest_of() -> list[float]:
    from gtpo_megatron import control

    return control.largest([rank(), -rank(), 0.1])


@pytest.mark.parametrize("world", [1, 3])
def test_the_largest_of_all_ranks(ranks: RankPool, world: int) -> None:
    assert ranks.run(world, largest_of) == [[world - 1, 0, 0.1]] * world


def not_moved(verb: str) -> str:
    from gtpo_megatron import control

    value = threading.Lock()
    action = {
        "broadcast": lambda: control.broadcast_from_zero(value if rank() == 0 else None),
        "scatter": lambda: control.scatter([1, value] if rank() == 0 else None),
        "short": lambda: control.scatter([1] if rank() == 0 else None),
        "gather": lambda: control.gather_to_zero(value if rank() == 1 else None),
    }[verb]
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "arrived"


@pytest.mark.parametrize("verb", ["broadcast", "scatter", "short", "gather"])
def test_what_cannot_travel_is_an_error_on_all_ranks(ranks: RankPool, verb: str) -> None:
    said = ranks.run(2, not_moved, verb)
    wrong = 1 if verb == "gather" else 0
    text = "1 parts for 2 ranks" if verb == "short" else "cannot pickle '_thread.lock' object"
    assert text in said[wrong]
    assert said[1 - wrong].startswith(f"RankError: rank {wrong}: ")
    assert text in said[1 - wrong]


def test_a_verb_needs_no_megatron() -> None:
    """The benchmark of the control plane starts many light processes."""
    import subprocess

    code = "import sys, gtpo_megatron.control, gtpo_megatron.trajectories.shares; print('megatron' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
