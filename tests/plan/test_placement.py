"""Servers on the ranks' GPUs: what cannot be, by name, and whose memory the planner counts in which turn."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.machine.probe import Machine
from gtpo_megatron.plan.checks import read_shape, settings_problems
from gtpo_megatron.plan.estimate import check_layout, make_plan
from gtpo_megatron.plan.facts import GPU, efficiency, find_gpu
from gtpo_megatron.plan.memory import ASLEEP, GIB, RUNTIME
from gtpo_megatron.plan.placement import placement_machine_problems
from gtpo_megatron.plan.search import splits

NODE = Machine((9, 0), True, gpus=8, local_ranks=8)
LENGTHS = [40.0] * 64


@pytest.fixture
def build(tiny_checkpoint: Callable[..., Any]) -> Callable[..., RunConfig]:
    """A run whose servers stand on its ranks' GPUs; keyword arguments are sections with the values that differ."""

    def make(**sections: dict[str, Any]) -> RunConfig:
        rollout = {"engine": "sglang", "placement": "together", "max_new_tokens": 64, "sglang": {}}
        rollout |= sections.pop("rollout", {})
        rollout["sglang"] = {"weight_transfer": "tensor", "servers": 8} | rollout["sglang"]
        values: dict[str, Any] = {
            "name": "trial",
            "model": {"path": str(tiny_checkpoint("llama")), "dtype": "bf16"},
            "data": {"path": "rows.jsonl", "max_prompt_tokens": 64},
            "training": {"steps": 2},
            "rollout": rollout,
        }
        return RunConfig.model_validate(values | sections)

    return make


def test_one_node_of_eight_has_no_problem(build: Callable[..., RunConfig]) -> None:
    for method in ("tensor", "disk"):
        config = build(rollout={"sglang": {"weight_transfer": method}})
        assert [*settings_problems(config), *placement_machine_problems(config, 8, NODE)] == []


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"rollout": {"sglang": {"weight_transfer": "distributed"}}}, "weight_transfer: distributed"),
        ({"rollout": {"staleness": 1}, "algorithm": {"importance": {"level": "token"}}}, "staleness: 1"),
        ({"rollout": {"sglang": {"router": True}}}, "rollout.sglang.router: true"),
        (
            {"rollout": {"sglang": {"urls": ["http://a:1"], "servers": 1}}},
            "rollout.sglang.urls gives servers",
        ),
        ({"rollout": {"sglang": {"urls_file": "a", "servers": 1}}}, "rollout.sglang.urls_file gives servers"),
        ({"rollout": {"sglang": {"urls_dir": "a", "servers": 1}}}, "rollout.sglang.urls_dir gives servers"),
        ({"algorithm": {"name": "sft"}}, "has no meaning with algorithm.name: sft"),
    ],
)
def test_what_does_not_go_with_turns_is_named(
    build: Callable[..., RunConfig], sections: dict[str, Any], problem: str
) -> None:
    (found,) = settings_problems(build(**sections))
    assert found.startswith("rollout.placement: together") and problem in found
    apart = {**sections, "rollout": {**sections.get("rollout", {}), "placement": "apart"}}
    assert list(settings_problems(build(**apart))) == []


def test_the_embedded_engine_has_no_servers_to_place(build: Callable[..., RunConfig]) -> None:
    config = build()
    embedded = config.rollout.model_copy(update={"engine": "embedded"})
    problems = list(settings_problems(config.model_copy(update={"rollout": embedded})))
    assert any("rollout.placement: together needs rollout.engine: sglang" in text for text in problems)


@pytest.mark.parametrize(
    ("world", "machine", "sglang", "problem"),
    [
        (16, NODE, {}, "with 16 ranks, of which 8 are on this machine"),
        (
            4,
            replace(NODE, local_ranks=4),
            {},
            "8 servers of tensor 1 from GPU 0 on take the GPUs to 7, but ranks are on 0 to 3",
        ),
        (4, replace(NODE, local_ranks=4), {"servers": 2, "tensor": 4}, "2 servers of tensor 4"),
        (4, replace(NODE, local_ranks=4), {"servers": 2, "first_gpu": 3}, "from GPU 3 on take the GPUs to 4"),
        (4, replace(NODE, local_ranks=4), {"servers": 2, "tensor": 2}, None),
        (2, Machine(None, False, local_ranks=2), {"servers": 4}, None),  # a CPU has no numbered places
    ],
)
def test_servers_stand_where_ranks_are(
    build: Callable[..., RunConfig], world: int, machine: Machine, sglang: dict[str, Any], problem: str | None
) -> None:
    config = build(rollout={"sglang": sglang})
    found = list(placement_machine_problems(config, world, machine))
    assert [problem in text for text in found] == ([True] if problem else [])
    apart = config.model_copy(update={"rollout": config.rollout.model_copy(update={"placement": "apart"})})
    assert list(placement_machine_problems(apart, world, machine)) == []


@pytest.fixture
def gpu() -> GPU:
    """So small that the tiny model's parts show."""
    return replace(find_gpu("h100-sxm"), memory=7 * GIB)


def test_the_planner_counts_both_sides_in_each_turn(build: Callable[..., RunConfig], gpu: GPU) -> None:
    config = build(rollout={"sglang": {"bucket_mb": 64, "memory_share": 0.75}})
    shape = read_shape(config.model.path)
    made = make_plan(config, shape, 8, gpu, LENGTHS, efficiency())
    worst, server = made.worst, made.server
    assert server is not None and worst.server == ASLEEP
    kept = worst.weights + 2 * 64 * 2**20 + RUNTIME + ASLEEP
    assert made.turns["training"] == worst.total > kept
    assert made.turns["weights"] == pytest.approx(kept + server.weights)
    # of what the trainer leaves free a server takes its share, weights included
    assert made.turns["sampling"] == pytest.approx(kept + 0.75 * (gpu.memory - kept))
    assert worst.host == worst.optimizer > 0
    moved = 2 * worst.optimizer / (gpu.host_bandwidth * efficiency().host_memory)
    assert made.step.turns == pytest.approx(moved)
    assert made.as_dict()["memory"]["by_turn"] == made.turns

    offloaded = config.model_copy(
        update={"optimizer": config.optimizer.model_copy(update={"offload": True, "distributed": True})}
    )
    assert make_plan(offloaded, shape, 8, gpu, LENGTHS, efficiency()).step.turns == 0


def test_apart_nothing_is_counted_twice(build: Callable[..., RunConfig], gpu: GPU) -> None:
    config = build(rollout={"placement": "apart", "sglang": {"servers": 1}})
    shape = read_shape(config.model.path)
    made = make_plan(config, shape, 8, gpu, LENGTHS, efficiency())
    assert (made.turns, made.step.turns, made.host_memory) == ({}, 0.0, 0.0)
    assert "server" not in made.worst.parts and "by_turn" not in made.as_dict()["memory"]
    assert splits(config, shape, 2, gpu, LENGTHS, efficiency())


def test_the_planner_has_the_rules_too(build: Callable[..., RunConfig], gpu: GPU) -> None:
    config = build()
    shape = read_shape(config.model.path)
    with pytest.raises(UserError, match="--gpus 4: rollout.placement: together: 8 servers of tensor 1"):
        check_layout(config, shape, 4)
    check_layout(config, shape, 8)
    assert splits(config, shape, 8, gpu, LENGTHS, efficiency()) == []
    # no room for a sequence beside the trainer, where a GPU of its own has plenty
    small = replace(gpu, memory=4 * GIB)
    with pytest.raises(UserError, match="has room for 0 tokens beside the weights"):
        make_plan(config, shape, 8, small, LENGTHS, efficiency())
    apart = build(rollout={"placement": "apart", "sglang": {"servers": 1}})
    make_plan(apart, shape, 8, small, LENGTHS, efficiency())
