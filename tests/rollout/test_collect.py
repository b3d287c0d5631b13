"""From prompts to analysed trajectories."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from gtpo_megatron.config import RewardConfig, RewardTerm
from gtpo_megatron.data.prompts import Prompt
from gtpo_megatron.errors import UserError
from gtpo_megatron.rewards.pool import RewardPool, Score, ScoreBatch
from gtpo_megatron.rollout.collect import (
    GroupPrompt,
    analyse,
    cut,
    gather,
    group_seed,
    sample_share,
    solutions,
    without_signal,
)
from gtpo_megatron.rollout.protocol import Completion, Group, PromptRequest, SamplingParams
from gtpo_megatron.trajectories.record import Trajectory
from tests.parallel.pool import RankPool
from tests.tiny_models import EOS_ID, tiny_tokenizer

PARAMS = SamplingParams(n=2, max_new_tokens=8)
PROMPTS = [
    GroupPrompt(
        group,
        Prompt(f"row-{group}", f"question {group}", str(group), None, (3, 4 + group)),
        100 + group,
        group,
    )
    for group in range(4)
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


class CountingEngine:
    """Says "<group> <index>" to every prompt, in reverse order; `closed` when its iterator was ended early."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.closed, self.requests = tokenizer, False, []

    def generate(self, requests: Sequence[PromptRequest], params: SamplingParams) -> Iterator[Group]:
        self.requests = list(requests)
        try:
            for request in reversed(requests):
                yield Group(request, tuple(self.complete(request, index) for index in range(params.n)))
        except GeneratorExit:
            self.closed = True
            raise

    def complete(self, request: PromptRequest, index: int) -> Completion:
        ids = np.array([*self.tokenizer(f"{request.group} {index}")["input_ids"], EOS_ID], np.int32)
        versions = np.full(len(ids), 5, np.int32)
        return Completion(ids, -np.ones(len(ids), np.float32), versions, "stop", 0.5)


class EchoPool:
    """A completion's reward is its first number; failed where it is 3."""

    def submit(self, items: Sequence[tuple[str, str, str]]) -> Any:
        class Done(ScoreBatch):
            def result(self) -> list[Score]:
                return [score(item) for item in items]

        def score(item: tuple[str, str, str]) -> Score:
            text, answer, question = item
            assert question == f"question {answer}" and text.split()[0] == answer
            if answer == "3":
                return Score(0.0, {"number": 0.0}, "no verdict")
            return Score(float(answer), {"number": float(answer)})

        return Done([])

    def check(self, scores: Sequence[Score]) -> None:
        self.checked = list(scores)


def test_every_completion_becomes_a_scored_trajectory(tokenizer: PreTrainedTokenizerFast) -> None:
    engine, pool = CountingEngine(tokenizer), EchoPool()
    batch = sample_share(engine, pool, tokenizer, PROMPTS, PARAMS, 6)
    assert [(r.group, r.prompt_ids, r.seed) for r in engine.requests] == [
        (g, (3, 4 + g), 100 + g) for g in range(4)
    ]
    assert [(t.group, t.index) for t in batch] == [(g, i) for g in (3, 2, 1, 0) for i in (0, 1)]
    assert len(pool.checked) == 8
    for t in batch:
        assert t.text == f"{t.group} {t.index}"  # special tokens are not part of the text
        assert (t.step, t.prompt_id, t.answer) == (6, f"row-{t.group}", str(t.group))
        assert t.prompt_ids.tolist() == [3, 4 + t.group]
        assert (t.token_ids[-1], t.finish_reason, t.seconds) == (EOS_ID, "stop", 0.5)
        assert len(t.logprobs) == len(t.token_versions) == t.length
        failed = t.group == 3
        assert t.reward == (0.0 if failed else t.group)
        assert t.reward_error == ("no verdict" if failed else None)
        assert t.reward_terms == {"number": t.reward}


def test_oversampling_keeps_the_first_groups_and_ends_the_others(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = CountingEngine(tokenizer)
    batch = sample_share(engine, EchoPool(), tokenizer, PROMPTS, PARAMS, 0, keep=2)
    assert {t.group for t in batch} == {3, 2}
    assert engine.closed


def test_a_share_of_failures_above_the_limit_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    term = RewardTerm(kind="python", function="tests.training_rewards:failing")
    config = RewardConfig(terms=(term,), workers=1, max_failed_share=0.5)
    with RewardPool(config) as pool, pytest.raises(UserError, match="8 of 8 completions could not be scored"):
        sample_share(CountingEngine(tokenizer), pool, tokenizer, PROMPTS, PARAMS, 0)


def test_seeds_of_groups_do_not_repeat() -> None:
    seeds = {group_seed(run, step, group) for run in range(4) for step in range(10) for group in range(10)}
    assert len(seeds) == 400
    assert (
        group_seed(1, 2, 3) == 3_249_313_114_888_634_144
    )  # of every release: a resumed run samples with the same
    assert all(0 <= seed < 2**62 for seed in seeds)  # a completion's index is added to it


def completion(group: int, index: int, tokens: list[int], reward: float) -> Trajectory:
    ids = np.array(tokens, np.int32)
    return Trajectory(
        step=0,
        group=group,
        index=index,
        prompt_id=str(group),
        prompt_ids=np.array([1], np.int32),
        token_ids=ids,
        logprobs=np.zeros(len(ids), np.float32),
        token_versions=np.zeros(len(ids), np.int32),
        finish_reason="stop",
        reward=reward,
    )


BATCH = [
    completion(0, 0, [7, 8, 1, 9], 3.0),
    completion(0, 1, [7, 8, 2, 2, 9], 1.0),
    completion(0, 2, [4, 9], 2.0),  # advantage 0: in conflict with nobody
    completion(1, 0, [7, 8], 5.0),
    completion(1, 1, [7, 8], 5.0),
]


def test_analysis_stays_within_groups() -> None:
    analysed = analyse(BATCH, normalize="mean")
    assert [t.advantage for t in analysed] == [1.0, -1.0, 0.0, 0.0, 0.0]
    assert [(t.prefix, t.suffix) for t in analysed] == [(2, 1), (2, 1), (0, 0), (0, 0), (0, 0)]
    assert [t.token_ids is other.token_ids for t, other in zip(analysed, BATCH, strict=True)] == [True] * 5


def test_analysis_for_grpo_divides_by_the_deviation() -> None:
    advantages = np.array([t.advantage for t in analyse(BATCH, normalize="std")])
    assert advantages[:3] == pytest.approx([1.0, -1.0, 0.0], rel=1e-3)
    doubled = [completion(t.group, t.index, t.token_ids.tolist(), 2 * t.reward) for t in BATCH]
    assert [t.advantage for t in analyse(doubled, normalize="std")] == pytest.approx(advantages, rel=1e-3)


def test_groups_without_signal() -> None:
    assert without_signal(BATCH) == {1}
    assert without_signal([]) == set()
    rounded = [replace(t, reward=0.1 + 0.2 if t.index % 2 else 0.3) for t in BATCH]
    assert without_signal(rounded) == {t.group for t in BATCH}  # as the advantages have it


def test_solutions(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = Prompt("row", "1 + 1 =", "2", "one and one", (5, 6))
    (t,) = solutions([GroupPrompt(4, prompt, 0, 0)], tokenizer, 9)
    assert (t.step, t.group, t.index, t.advantage, t.finish_reason) == (9, 4, 0, 1.0, "data")
    assert t.text == "<reasoning>\none and one\n</reasoning>\n<answer>\n2\n</answer>"
    assert t.token_ids[-1] == EOS_ID
    assert t.prompt_ids.tolist() == [5, 6]
    assert t.logprobs.tolist() == [0.0] * t.length
    assert t.token_versions.tolist() == [-1] * t.length  # no weights sampled them


def gathered(fails: int | None) -> list[tuple[int, int]] | str:
    import torch.distributed as dist

    rank = dist.get_rank()
    own: Any = [t for t in reversed(BATCH) if t.index % 2 == rank]
    if rank == fails:
        own = UserError("no server left")
    try:
        return [(t.group, t.index) for t in gather(own)]
    except UserError as error:
        return str(error)


def test_rank_zero_gathers_what_all_sampled(ranks: RankPool) -> None:
    assert ranks.run(2, gathered, None) == [[(t.group, t.index) for t in BATCH], []]
    assert ranks.run(2, gathered, 1) == ["no server left"] * 2


def test_a_trajectory_is_cut_to_its_first_tokens() -> None:
    whole = solutions(PROMPTS[:1], tiny_tokenizer(), step=0)[0]
    assert cut(whole, whole.length) is whole and cut(whole, whole.length + 5) is whole
    short = cut(whole, 2)
    assert short.finish_reason == "length" and short.prompt_ids is whole.prompt_ids
    for name in ("token_ids", "logprobs", "token_versions"):
        assert getattr(short, name).tolist() == getattr(whole, name)[:2].tolist()
