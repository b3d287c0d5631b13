"""Time limits of process groups: long where rank 0 may keep the others waiting, short where ranks wait for each other alone."""

import time
from typing import Any

import pytest

from tests.parallel.pool import RankPool


def limits(parallel: dict[str, Any]) -> dict[str, float]:
    """Seconds by description of each group that Megatron makes for a layout, and of the control group."""
    import torch
    import torch.distributed as dist

    from gtpo_megatron import control
    from gtpo_megatron.config import ParallelConfig
    from gtpo_megatron.policy.model import initialize_parallel

    before = set(dist.distributed_c10d._world.pg_map)
    initialize_parallel(ParallelConfig(**parallel), seed=0)
    made = set(dist.distributed_c10d._world.pg_map) - before

    def seconds(group: dist.ProcessGroup) -> float:
        return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()

    found = {f"{group.group_desc} {group.group_name}": seconds(group) for group in made}
    return found | {"control": seconds(control.group())}


@pytest.mark.parametrize(
    "parallel", [{"tensor": 2, "pipeline": 2}, {"context": 2}, {"expert": 2, "tensor": 2}]
)
def test_no_group_of_megatrons_has_a_limit_of_its_own(ranks: RankPool, parallel: dict[str, Any]) -> None:
    from gtpo_megatron import control

    for found in ranks.run(4, limits, parallel):
        assert found.pop("control") == control.WAIT_LIMIT.total_seconds()
        assert len(found) > 5
        assert set(found.values()) == {control.STEP_LIMIT.total_seconds()}, found


def kept_waiting(limit_s: float, allowed_s: float, wait_s: float) -> str:
    """Rank 0 keeps rank 1 waiting on a control group whose limit was `limit_s` and then is longer by so much."""
    from datetime import timedelta
    from unittest.mock import patch

    import torch.distributed as dist

    from gtpo_megatron import control

    with (
        patch.object(control, "WAIT_LIMIT", timedelta(seconds=limit_s)),
        patch.object(control, "_group", None),
    ):
        control.agree(False)
        control.allow_waits(allowed_s)
        if dist.get_rank() == 0:
            time.sleep(wait_s)
        try:
            control.agree(False)
        except RuntimeError as error:
            return "late" if dist.get_rank() else str(error)
        return "agreed"


def test_ranks_wait_as_long_as_the_configuration_lets_rank_0_wait(ranks: RankPool) -> None:
    assert ranks.run(2, kept_waiting, 1.0, 60.0, 2.5) == ["agreed", "agreed"]


def test_and_no_longer(ranks: RankPool) -> None:
    assert ranks.run(2, kept_waiting, 1.0, 0.0, 2.5)[1] == "late"
