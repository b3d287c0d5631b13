"""What of a batch goes to which rank: every row once, whole, and no more than a row is made of."""

import pickle

import numpy as np
import pytest

from gtpo_megatron.trajectories.packing import plan_micro_batches
from gtpo_megatron.trajectories.record import Trajectory
from gtpo_megatron.trajectories.shares import BatchTable, shares_of


def batch(count: int, longest: int) -> list[Trajectory]:
    random = np.random.default_rng(0)

    def trajectory(place: int) -> Trajectory:
        length = int(random.integers(1, longest + 1))
        return Trajectory(
            step=3,
            group=place // 4,
            index=place % 4,
            prompt_id=f"row-{place // 4}",
            prompt_ids=random.integers(0, 99, 1 + place // 4).astype(np.int32),
            token_ids=random.integers(0, 99, length).astype(np.int32),
            logprobs=random.normal(size=length).astype(np.float32),
            token_versions=np.zeros(length, np.int32),
            finish_reason="stop",
            text="words " * length,
            advantage=float(random.normal()),
            prefix=length // 2,
            suffix=length // 3,
        )

    return [trajectory(place) for place in range(count)]


@pytest.mark.parametrize(("count", "replicas"), [(16, 1), (16, 3), (2, 4)])
def test_every_row_arrives_once_and_whole(count: int, replicas: int) -> None:
    trajectories = batch(count, longest=20)
    prompts, lengths = [len(t.prompt_ids) for t in trajectories], [t.length for t in trajectories]
    plan = plan_micro_batches(prompts, lengths, token_budget=64, data_parallel=replicas)
    shares = pickle.loads(pickle.dumps(shares_of(trajectories, plan)))
    assert [share.micro_batches for share in shares] == list(plan.micro_batches)
    places = [place for share in shares for place in share.rows()]
    assert sorted(places) == list(range(count))
    for share in shares:
        for place, row in share.rows().items():
            for name in ("prompt_ids", "token_ids", "logprobs"):
                found, sent = getattr(row, name), getattr(trajectories[place], name)
                assert found.dtype == sent.dtype
                assert found.tolist() == sent.tolist()
            assert row.length == trajectories[place].length


def test_a_share_is_little_more_than_its_tokens() -> None:
    trajectories = batch(64, longest=400)
    prompts, lengths = [len(t.prompt_ids) for t in trajectories], [t.length for t in trajectories]
    plan = plan_micro_batches(prompts, lengths, token_budget=2000, data_parallel=4)
    bare = sum(t.prompt_ids.nbytes + t.token_ids.nbytes + t.logprobs.nbytes for t in trajectories)
    sent = sum(len(pickle.dumps(share)) for share in shares_of(trajectories, plan))
    assert bare < sent < 1.05 * bare


def test_the_table_holds_what_the_loss_needs_of_all() -> None:
    trajectories = batch(40, longest=20)
    table = pickle.loads(pickle.dumps(BatchTable.of(trajectories)))
    assert len(table) == 40
    assert table.tokens == sum(t.length for t in trajectories)
    for name in ("prefix", "suffix", "length", "group"):
        assert table.rows[name].tolist() == [getattr(t, name) for t in trajectories]
    assert table.rows["advantage"].tolist() == [float(np.float32(t.advantage)) for t in trajectories]
    assert table.rows.nbytes == 20 * 40
