"""Groups from real servers: exact logprobs, every request answered once, clear refusals."""

import copy
import itertools
import time

import httpx
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from gtpo_megatron.errors import UserError
from gtpo_megatron.rollout.protocol import PromptRequest, SamplingParams
from tests.sglang.conftest import MakeEngine, Servers, logprobs_of, perturb, weights_of

pytestmark = pytest.mark.sglang


def requests(count: int) -> list[PromptRequest]:
    return [PromptRequest(i, (5, 6, 7 + i), seed=i) for i in range(count)]


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 0.9, 20), (0.0, 1.0, 0)])
def test_every_request_is_answered_once_with_the_trainers_logprobs(
    make_engine: MakeEngine, model: PreTrainedModel, temperature: float, top_p: float, top_k: int
) -> None:
    engine = make_engine(concurrency=8)
    engine.update_weights(weights_of(model), 3)
    params = SamplingParams(4, 24, temperature, top_p, top_k, stop_token_ids=(2,))
    groups = list(engine.generate(requests(10), params))
    assert sorted(g.request.group for g in groups) == list(range(10))
    for group in groups:
        assert len(group.completions) == 4
        for completion in group.completions:
            assert (completion.token_versions == 3).all()
            assert completion.finish_reason == ("stop" if completion.token_ids[-1] == 2 else "length")
            assert completion.finish_reason == "stop" or len(completion.token_ids) == 24
            if temperature:
                ours = logprobs_of(model, group.request.prompt_ids, completion.token_ids, temperature)
                np.testing.assert_allclose(completion.logprobs, ours, atol=1e-4)
    if not temperature:
        assert all(
            np.array_equal(c.token_ids, g.completions[0].token_ids) for g in groups for c in g.completions
        )


def test_samples_follow_the_distribution_of_the_weights(
    make_engine: MakeEngine, model: PreTrainedModel
) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(2)  # probabilities of all sizes
    engine = make_engine()
    engine.update_weights(weights_of(model), 0)
    count = 2000
    (group,) = engine.generate(requests(1), SamplingParams(count, 2))
    tokens = torch.tensor(np.stack([c.token_ids for c in group.completions])).long()
    prompt = torch.tensor(group.request.prompt_ids).expand(count, -1)
    with torch.no_grad():
        logits = model(torch.cat([prompt, tokens], 1)).logits[:, prompt.size(1) - 1 : -1]
    probabilities = logits.double().softmax(-1)
    filled = 0
    for low, high in itertools.pairwise((0.0, 0.001, 0.01, 0.05, 0.2, 1.0)):
        inside = (probabilities >= low) & (probabilities < high)
        expected = (probabilities * inside).sum(-1)
        seen = inside.gather(-1, tokens[..., None]).sum()
        deviation = (expected * (1 - expected)).sum().sqrt()
        filled += bool(expected.sum() > 20)
        assert abs(seen - expected.sum()) < 5 * deviation + 1e-6
    assert filled >= 4


def test_both_servers_share_the_work(
    make_engine: MakeEngine, servers: Servers, model: PreTrainedModel
) -> None:
    engine = make_engine(concurrency=4)
    engine.update_weights(weights_of(model), 0)
    before = [process.log.read_text().count("POST /generate") for process in servers.processes]
    list(engine.generate(requests(6), SamplingParams(4, 16)))
    after = [process.log.read_text().count("POST /generate") for process in servers.processes]
    assert sum(after) - sum(before) == 24
    # each takes as many as it may have in flight; who answers the rest is a matter of speed
    assert min(b - a for a, b in zip(before, after, strict=True)) >= 4


def test_leaving_early_or_abort_all_ends_the_rest_on_the_servers(
    make_engine: MakeEngine, servers: Servers, model: PreTrainedModel
) -> None:
    engine = make_engine()
    engine.update_weights(weights_of(model), 0)
    long = SamplingParams(4, 3500)  # minutes, if nobody ends them
    short_first = engine.generate(requests(4), SamplingParams(2, 4))
    left = engine.generate(requests(8), long)
    aborted = engine.generate(requests(8), long)
    assert len(list(itertools.islice(short_first, 2))) == 2
    left.close()
    engine.abort_all()
    assert list(aborted) == []
    deadline = time.monotonic() + 20
    while any(_running(url) for url in servers.urls):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert len(list(engine.generate(requests(2), SamplingParams(2, 4)))) == 2
    engine.abort_all(for_good=True)
    assert list(engine.generate(requests(2), long)) == []


def _running(url: str) -> int:
    loads = httpx.get(f"{url}/v1/loads", timeout=30).json()["loads"]
    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)


def test_groups_left_unfinished_go_on_with_the_next_weights(
    make_engine: MakeEngine, model: PreTrainedModel
) -> None:
    engine = make_engine(partial=True)
    engine.update_weights(weights_of(model), 0)
    params = SamplingParams(2, 300, stop_token_ids=(2, 3, 4))  # about a hundred tokens, or any number
    asked = requests(12)
    first = engine.generate(asked, params)
    done = {next(first).request.group for _ in range(3)}
    first.close()
    models = [model, copy.deepcopy(model)]
    perturb(models[1], 1)
    engine.update_weights(weights_of(models[1]), 1)
    rest = list(engine.generate([r for r in asked if r.group not in done], params))
    assert {g.request.group for g in rest} == set(range(12)) - done
    mixed = 0
    for completion, request in ((c, g.request) for g in rest for c in g.completions):
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] in (2, 3, 4) else "length")
        versions = completion.token_versions
        assert (np.diff(versions) >= 0).all()
        mixed += len(set(versions.tolist())) > 1
        by_version = [logprobs_of(m, request.prompt_ids, completion.token_ids) for m in models]
        ours = np.where(versions == 0, *by_version)
        np.testing.assert_allclose(completion.logprobs, ours, atol=2e-4)
    assert mixed >= 3
    again = list(engine.generate(asked, params))  # of what was used nothing is left
    assert all((c.token_versions == 1).all() for g in again for c in g.completions)


def test_refusals_name_the_server_and_its_answer(make_engine: MakeEngine, model: PreTrainedModel) -> None:
    engine = make_engine()
    with pytest.raises(UserError, match="update_weights first"):
        engine.generate(requests(1), SamplingParams(1, 4))
    engine.update_weights(weights_of(model), 0)
    with pytest.raises(UserError, match="outside the vocabulary"):
        engine.generate([PromptRequest(0, (5, 320), 0)], SamplingParams(1, 4))
    with pytest.raises(UserError, match=r"127.0.0.1:\d+/generate refused .* longer than"):
        list(engine.generate([PromptRequest(0, (5,) * 5000, 0)], SamplingParams(1, 4)))
    assert len(list(engine.generate(requests(1), SamplingParams(2, 4)))) == 1


def test_a_late_group_goes_on_elsewhere(make_engine: MakeEngine, model: PreTrainedModel) -> None:
    engine = make_engine(group_timeout_s=0.5, partial=True)
    engine.update_weights(weights_of(model), 0)
    (group,) = engine.generate(requests(1), SamplingParams(2, 1500))
    for completion in group.completions:
        assert completion.finish_reason in ("stop", "length")
        ours = logprobs_of(model, group.request.prompt_ids, completion.token_ids)
        np.testing.assert_allclose(completion.logprobs, ours, atol=2e-4)
