"""Where an evaluation's completions come from: the embedded engine, SGLang servers, or an OpenAI-compatible endpoint."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from gtpo_megatron.config import RunConfig
from gtpo_megatron.data.prompts import Prompt, Question
from gtpo_megatron.evaluation.endpoint import NO_TOKENS, Endpoint, TextCompletion
from gtpo_megatron.evaluation.training import scoring
from gtpo_megatron.policy import platform
from gtpo_megatron.policy.model import DTYPES, world_rank
from gtpo_megatron.rewards.pool import RewardPool, Score
from gtpo_megatron.rollout.collect import GroupPrompt, gather, group_seed, sample_share
from gtpo_megatron.rollout.embedded import EmbeddedEngine
from gtpo_megatron.rollout.protocol import Group, PromptRequest, RolloutEngine, SamplingParams
from gtpo_megatron.trajectories.record import Trajectory


@dataclass(frozen=True)
class Sampled:
    """What one call gave: whole groups, on rank 0."""

    trajectories: list[Trajectory]
    lengths: dict[tuple[int, int], int] = field(default_factory=dict)  # tokens, where no token ids are known
    error: BaseException | None = None  # what ended the sampling early; the groups before it are whole


@dataclass(frozen=True)
class Part:
    """Prompts to sample, by their place in the suite, and how."""

    prompts: Sequence[tuple[int, Prompt | Question]]
    params: SamplingParams
    seed: int
    sampled: Callable[[int], None] = lambda place: None  # called with each prompt's place once it is


Sampler = Callable[[Part], Sampled]  # collective


@contextmanager
def open_sampler(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase | None, logs: Path
) -> Iterator[Sampler]:
    """The sampler that the configuration asks for, with the weights at model.path. Collective.

    Raises:
        UserError: servers do not start, or the endpoint's URL or key are none.
    """
    if config.evaluation.endpoint.url is not None:
        endpoint = Endpoint(config.evaluation.endpoint)
        with RewardPool(scoring(config)) as rewards:
            yield lambda part: _from_endpoint(endpoint, rewards, part)
        return
    assert tokenizer is not None
    engine = _engine(config, tokenizer, logs)
    try:
        model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=DTYPES[config.model.dtype])
        engine.update_weights(model.state_dict().items(), version=0)
        del model
        with RewardPool(scoring(config)) as rewards:
            yield lambda part: _from_engine(engine, rewards, tokenizer, part)
    finally:
        engine.close()


def _engine(config: RunConfig, tokenizer: PreTrainedTokenizerBase, logs: Path) -> RolloutEngine:
    path, dtype = config.model.path, config.model.dtype
    if config.rollout.engine == "embedded":
        batch, device = config.rollout.batch_size, platform.device()
        return EmbeddedEngine(path, DTYPES[dtype], device, batch, tokenizer.pad_token_id)
    from gtpo_megatron.rollout.sglang.engine import SGLangEngine

    return SGLangEngine(config.rollout.sglang, path, dtype, logs)


class _Watched:
    """An engine whose groups are told of as they come. Where each rank has one, an error of it is raised; a single one's
    groups end quietly at an error, which is kept: what came before it can be scored and written."""

    def __init__(self, engine: RolloutEngine, sampled: Callable[[int], None]) -> None:
        self._engine, self._sampled = engine, sampled
        self.error: BaseException | None = None

    def generate(self, requests: Sequence[PromptRequest], params: SamplingParams) -> Iterator[Group]:
        try:
            for group in self._engine.generate(requests, params):
                self._sampled(group.request.group)
                yield group
        except (Exception, KeyboardInterrupt) as error:
            if self._engine.on_every_rank:
                raise
            self.error = error


def _from_engine(
    engine: RolloutEngine, rewards: RewardPool, tokenizer: PreTrainedTokenizerBase, part: Part
) -> Sampled:
    places = [GroupPrompt(g, prompt, group_seed(part.seed, 0, g), g) for g, prompt in part.prompts]
    watched = _Watched(engine, part.sampled)
    if not engine.on_every_rank:
        sampled = sample_share(watched, rewards, tokenizer, places, part.params, step=0)
        return Sampled(sampled, error=watched.error)
    own = places[world_rank() :: dist.get_world_size()]
    try:
        share = sample_share(watched, rewards, tokenizer, own, part.params, step=0)
    except Exception as error:  # told to all ranks
        return Sampled(gather(error))
    return Sampled(gather(share))


def _from_endpoint(endpoint: Endpoint, rewards: RewardPool, part: Part) -> Sampled:
    asked = [(group, question, group_seed(part.seed, 0, group)) for group, question in part.prompts]
    whole, error = endpoint.sample(asked, part.params, part.sampled)
    scores = {
        group: rewards.submit(
            [(completion.text, question.answer, question.question) for completion in whole[group]]
        )
        for group, question, _ in asked
        if group in whole
    }
    trajectories, lengths = [], {}
    for group, question, _ in asked:
        if group not in whole:
            continue
        for index, (completion, score) in enumerate(zip(whole[group], scores[group].result(), strict=True)):
            trajectories.append(_text_trajectory(group, index, question, completion, score))
            if completion.tokens is not None:
                lengths[group, index] = completion.tokens
    return Sampled(trajectories, lengths, error)


def _text_trajectory(
    group: int, index: int, question: Question, completion: TextCompletion, score: Score
) -> Trajectory:
    """A completion of which only the text is known: its arrays are empty."""
    return Trajectory(
        step=0,
        group=group,
        index=index,
        prompt_id=question.id,
        prompt_ids=NO_TOKENS,
        token_ids=NO_TOKENS,
        logprobs=NO_TOKENS.astype("float32"),
        token_versions=NO_TOKENS,
        finish_reason=completion.finish_reason,
        text=completion.text,
        answer=question.answer,
        reward=score.total,
        reward_terms=score.terms,
        reward_error=score.error,
        seconds=completion.seconds,
    )
