"""The order of prompts, and its exact restoration."""

import json

import pytest

from gtpo_megatron.data.sampler import PromptSampler
from gtpo_megatron.errors import UserError


def test_every_epoch_is_its_own_permutation() -> None:
    sampler = PromptSampler(7, seed=3, shuffle=True)
    epochs = [sampler.next(7) for _ in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_fixes_the_order_for_all_time() -> None:
    assert PromptSampler(8, seed=0, shuffle=True).next(10) == [3, 2, 1, 6, 0, 7, 4, 5, 7, 4]
    assert PromptSampler(8, seed=1, shuffle=True).next(8) != PromptSampler(8, seed=0, shuffle=True).next(8)


def test_batches_reach_over_the_end_of_an_epoch() -> None:
    whole = PromptSampler(5, seed=1, shuffle=True).next(23)
    sampler = PromptSampler(5, seed=1, shuffle=True)
    assert [index for n in (3, 4, 12, 0, 4) for index in sampler.next(n)] == whole
    assert sampler.epoch == 4


def test_without_shuffle_the_order_is_the_sets() -> None:
    assert PromptSampler(3, seed=9, shuffle=False).next(7) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("taken", [0, 4, 5, 13])
def test_a_saved_position_goes_on_exactly(taken: int) -> None:
    sampler = PromptSampler(5, seed=2, shuffle=True, fingerprint="abc")
    sampler.next(taken)
    state = json.loads(json.dumps(sampler.state_dict()))
    restored = PromptSampler(5, seed=99, shuffle=False, fingerprint="abc")
    restored.next(2)
    restored.load_state_dict(state)
    assert restored.next(17) == sampler.next(17)


def test_what_is_put_back_comes_first_and_is_saved() -> None:
    sampler = PromptSampler(8, seed=2, shuffle=True)
    whole = sampler.next(8)
    sampler = PromptSampler(8, seed=2, shuffle=True)
    sampler.next(4)
    sampler.put_back(whole[1:3])
    before = json.loads(json.dumps(sampler.state_dict()))
    expected = [whole[1], whole[2], whole[4], whole[5]]
    assert [*sampler.next(1), *sampler.next(3)] == expected
    assert sampler.state_dict()["taken"] == 8
    restored = PromptSampler(8, seed=2, shuffle=True)
    restored.load_state_dict(before)
    assert restored.next(4) == expected


@pytest.mark.parametrize(("size", "fingerprint"), [(6, "abc"), (5, "xyz")])
def test_the_state_of_another_set_is_refused(size: int, fingerprint: str) -> None:
    state = PromptSampler(5, seed=2, shuffle=True, fingerprint="abc").state_dict()
    with pytest.raises(UserError, match="belongs to another prompt set"):
        PromptSampler(size, seed=2, shuffle=True, fingerprint=fingerprint).load_state_dict(state)
