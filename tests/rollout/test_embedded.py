"""The embedded engine: what it samples depends on seeds and weights alone, and it reports what it did."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from gtpo_megatron.rollout.embedded import EmbeddedEngine
from gtpo_megatron.rollout.protocol import Completion, Group, PromptRequest, SamplingParams
from tests.tiny_models import PAD_ID

PARAMS = SamplingParams(n=3, max_new_tokens=10, temperature=0.7)
PROMPTS = [(5, 9, 200, 31), (17,), (40, 41, 42, 43, 44, 45, 46), (300, 301), (8, 250, 3)]
REQUESTS = [PromptRequest(group, prompt, 1000 * group) for group, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[[str], Path]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint("qwen2_tied"), dtype=torch.float32).eval()


@pytest.fixture
def make(tiny_checkpoint: Callable[[str], Path], model: PreTrainedModel) -> Callable[[int], EmbeddedEngine]:
    """Engines with the model's weights, as version 7."""

    def engine(batch_size: int = 64) -> EmbeddedEngine:
        path = str(tiny_checkpoint("qwen2_tied"))
        made = EmbeddedEngine(path, torch.float32, torch.device("cpu"), batch_size, PAD_ID)
        made.update_weights(model.named_parameters(), 7)
        return made

    return engine


def completions(engine: EmbeddedEngine, params: SamplingParams = PARAMS) -> list[Completion]:
    groups = sorted(engine.generate(REQUESTS, params), key=lambda group: group.request.group)
    assert [group.request for group in groups] == REQUESTS
    assert all(len(group.completions) == params.n for group in groups)
    return [completion for group in groups for completion in group.completions]


def token_ids(sampled: Sequence[Completion]) -> list[list[int]]:
    return [c.token_ids.tolist() for c in sampled]


@torch.no_grad()
def logits_of(model: PreTrainedModel, place: int, completion: Completion, n: int = PARAMS.n) -> torch.Tensor:
    """[length, vocabulary] from which each token follows, by one pass over prompt and completion."""
    prompt = PROMPTS[place // n]
    ids = torch.tensor([*prompt, *completion.token_ids.tolist()])
    return model(ids[None]).logits[0, len(prompt) - 1 : -1]


def rounding(model: PreTrainedModel, logits: torch.Tensor) -> float:
    """How far two float32 computations of a logprob may be apart: machine epsilon (one rounding of each), times the root
    of how many terms are summed one after the other on the way (rounding errors walk at random), times the logits' scale."""
    config = model.config
    layer = 4 * config.hidden_size + config.intermediate_size  # q/k/v, scores, output, gate/up; down
    terms = config.num_hidden_layers * layer + config.hidden_size
    return torch.finfo(torch.float32).eps * terms**0.5 * float(logits.abs().max())


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_samples_do_not_depend_on_the_batch(
    make: Callable[[int], EmbeddedEngine], model: PreTrainedModel, batch_size: int
) -> None:
    together, apart = (completions(make(size)) for size in (64, batch_size))
    assert token_ids(apart) == token_ids(together)
    for place, (one, other) in enumerate(zip(apart, together, strict=True)):
        bound = rounding(model, logits_of(model, place, one) / PARAMS.temperature)
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=bound)


def test_samples_depend_on_the_seed(make: Callable[[int], EmbeddedEngine]) -> None:
    engine = make()
    sampled = token_ids(completions(engine))
    assert token_ids(completions(engine)) == sampled
    assert len({tuple(ids) for ids in sampled}) == len(sampled)
    (other,) = engine.generate([replace(REQUESTS[0], seed=1)], PARAMS)
    assert token_ids(other.completions) != sampled[: PARAMS.n]


@pytest.mark.parametrize("limits", [{}, {"top_k": 5}, {"top_p": 0.5}])
def test_logprobs_are_of_the_whole_tempered_distribution(
    make: Callable[[int], EmbeddedEngine], model: PreTrainedModel, limits: dict[str, float]
) -> None:
    params = replace(PARAMS, **limits)
    for place, completion in enumerate(completions(make(), params)):
        logits = logits_of(model, place, completion) / params.temperature
        logprobs = logits.log_softmax(-1)
        chosen = torch.from_numpy(completion.token_ids).long()[:, None]
        bound = rounding(model, logits)
        np.testing.assert_allclose(completion.logprobs, logprobs.gather(1, chosen)[:, 0], rtol=0, atol=bound)
        assert completion.logprobs.dtype == np.float32
        assert completion.token_versions.tolist() == [7] * len(completion.token_ids)


def test_top_k_and_top_p_bound_what_is_sampled(
    make: Callable[[int], EmbeddedEngine], model: PreTrainedModel
) -> None:
    ranks, before = [], []
    for place, completion in enumerate(completions(make(), replace(PARAMS, top_k=5))):
        logits = logits_of(model, place, completion)
        chosen = logits.gather(1, torch.from_numpy(completion.token_ids).long()[:, None])
        ranks += (logits > chosen).sum(-1).tolist()
    assert set(ranks) == set(range(5))
    for place, completion in enumerate(completions(make(), replace(PARAMS, top_p=0.5))):
        p = (logits_of(model, place, completion) / PARAMS.temperature).softmax(-1)
        chosen = p.gather(1, torch.from_numpy(completion.token_ids).long()[:, None])
        before += torch.where(p > chosen, p, 0.0).sum(-1).tolist()  # mass of the likelier tokens
    assert max(before) < 0.5


def test_frequencies_are_the_probabilities(
    make: Callable[[int], EmbeddedEngine], model: PreTrainedModel
) -> None:
    count = 4000
    params = SamplingParams(n=count, max_new_tokens=1, temperature=0.5)
    (group,) = make(count).generate(REQUESTS[:1], params)
    found = np.bincount([int(c.token_ids[0]) for c in group.completions], minlength=320) / count
    p = (logits_of(model, 0, group.completions[0], n=count)[0] / 0.5).softmax(-1).numpy()
    assert p.max() > 0.1  # there is something to tell apart
    deviations = (found - p) / np.sqrt(p * (1 - p) / count)
    assert np.abs(deviations[p > 0.01]).max() < 4


def test_greedy(make: Callable[[int], EmbeddedEngine], model: PreTrainedModel) -> None:
    params = SamplingParams(n=1, max_new_tokens=10, temperature=0.0)
    greedy = completions(make(), params)
    for place, completion in enumerate(greedy):
        logits = logits_of(model, place, completion, n=1)
        assert completion.token_ids.tolist() == logits.argmax(-1).tolist()
        bound = rounding(model, logits)
        np.testing.assert_allclose(completion.logprobs, logits.log_softmax(-1).amax(-1), rtol=0, atol=bound)
    assert token_ids(completions(make(), replace(params, temperature=1.0, top_k=1))) == token_ids(greedy)


def test_a_completion_ends_with_its_first_stop_token(make: Callable[[int], EmbeddedEngine]) -> None:
    stops = tuple(range(40))
    free = completions(make())
    stopped = completions(make(), replace(PARAMS, stop_token_ids=stops))
    assert {c.finish_reason for c in free} == {"length"}
    assert {c.finish_reason for c in stopped} == {"length", "stop"}
    for without, completion in zip(free, stopped, strict=True):
        places = [place for place, token in enumerate(without.token_ids) if token in stops]
        length = places[0] + 1 if places else PARAMS.max_new_tokens
        assert completion.token_ids.tolist() == without.token_ids[:length].tolist()
        assert completion.finish_reason == ("stop" if places else "length")
        assert len(completion.logprobs) == len(completion.token_versions) == length


def test_defaults_of_the_checkpoint_do_not_change_the_distribution(
    make: Callable[[int], EmbeddedEngine], tmp_path: Path, model: PreTrainedModel
) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        '{"do_sample": true, "top_k": 1, "repetition_penalty": 5.0, "eos_token_id": [5, 6, 7], "max_length": 3}'
    )
    engine = EmbeddedEngine(str(tmp_path), torch.float32, torch.device("cpu"), 64, PAD_ID)
    engine.update_weights(model.named_parameters(), 0)
    assert token_ids(completions(engine)) == token_ids(completions(make()))


def test_weights_that_are_not_the_models_are_refused(
    make: Callable[[int], EmbeddedEngine], model: PreTrainedModel
) -> None:
    engine = make()
    weights = dict(model.named_parameters())
    missing = "model.layers.2.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=f"version 8 lack 1 tensors, e.g. {missing}"):
        engine.update_weights(((n, t) for n, t in weights.items() if n != missing), 8)
    assert engine.version == 7
    with pytest.raises(KeyError, match="unheard.of"):
        engine.update_weights([("unheard.of", torch.zeros(1))], 8)
    tied = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    engine.update_weights((weights | tied).items(), 8)
    assert engine.version == 8


def test_new_weights_are_sampled_from(make: Callable[[int], EmbeddedEngine], model: PreTrainedModel) -> None:
    engine = make()
    before = token_ids(completions(engine))
    engine.update_weights([(name, 0.5 * tensor) for name, tensor in model.named_parameters()], 8)
    sampled = completions(engine)
    assert token_ids(sampled) != before
    assert {int(v) for c in sampled for v in c.token_versions} == {8}


def test_abort_ends_after_the_batch_under_way(make: Callable[[int], EmbeddedEngine]) -> None:
    engine = make(batch_size=2 * PARAMS.n)
    groups: list[Group] = []
    for group in engine.generate(REQUESTS, PARAMS):
        groups.append(group)
        engine.abort_all()
    assert [group.request.group for group in groups] == [1, 3]  # the two shortest prompts make a batch
    assert len(list(engine.generate(REQUESTS, PARAMS))) == len(
        REQUESTS
    )  # an abort does not outlive its sampling


def test_abort_leaves_the_batch_under_way_and_for_good_ends_what_comes_later(
    make: Callable[[int], EmbeddedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    forward, calls = engine.model.forward, 0

    def aborted_at_the_third(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            engine.abort_all(for_good=True)
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.model, "forward", aborted_at_the_third)
    assert list(engine.generate(REQUESTS, PARAMS)) == []
    assert list(engine.generate(REQUESTS, PARAMS)) == []  # the signal came just before
    assert calls == 3 < PARAMS.max_new_tokens
