"""The three ways of weights, checked by logprobs and checksums; updates in the middle of generation."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch.distributed
from transformers import AutoModelForCausalLM, PreTrainedModel

from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.rollout.protocol import Group, NamedTensor, PromptRequest, SamplingParams
from gtpo_megatron.rollout.sglang import SGLangEngine
from gtpo_megatron.rollout.sglang.weights.buckets import Snapshot
from tests.parallel.pool import RankPool
from tests.sglang.conftest import MakeEngine, Servers, logprobs_of, perturb, run_servers, weights_of

pytestmark = pytest.mark.sglang


def worst_gap(engine: SGLangEngine, model: PreTrainedModel, version: int) -> float:
    requests = [PromptRequest(i, (9, 8, 7 + i), 0) for i in range(4)]
    gaps = []
    for group in engine.generate(requests, SamplingParams(4, 16)):
        for completion in group.completions:
            assert (completion.token_versions == version).all()
            ours = logprobs_of(model, group.request.prompt_ids, completion.token_ids)
            gaps.append(np.abs(completion.logprobs - ours).max())
    return float(max(gaps))


@pytest.mark.parametrize("method", ["distributed", "tensor", "disk"])
def test_updates_reach_every_server_exactly(
    make_engine: MakeEngine, model: PreTrainedModel, method: str
) -> None:
    engine = make_engine(weight_transfer=method)
    for version in (0, 1):
        perturb(model, version)
        engine.update_weights(weights_of(model), version)
        assert set(engine.status().values()) == {"ready"}
        assert engine.version == version
        assert worst_gap(engine, model, version) < 1e-4
    engine.verify_weights(weights_of(model))
    assert worst_gap(engine, model, 1) < 1e-4
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope="module")
def server_of_two(
    sglang_python: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    """A server whose weights are split over two ranks."""
    with run_servers(sglang_python, checkpoint, tmp_path_factory.mktemp("sglang-tp2"), tensor=2) as servers:
        servers.wait()
        yield servers


@pytest.mark.soak
@pytest.mark.parametrize("method", ["distributed", "tensor", "disk"])
def test_servers_of_other_layouts_are_updated_together(
    make_engine: MakeEngine,
    servers: Servers,
    server_of_two: Servers,
    model: PreTrainedModel,
    method: str,
) -> None:
    engine = make_engine(weight_transfer=method, urls=(server_of_two.urls[0], servers.urls[0]))
    perturb(model, 1)
    engine.update_weights(weights_of(model), 0)
    sequences = [((9, 8, 7), tuple(range(10, 40)))]
    scores = engine.score(sequences)
    assert len(scores) == 2
    ours = logprobs_of(model, (9, 8, 7), np.arange(10, 40, dtype=np.int32))
    for theirs in scores.values():
        np.testing.assert_allclose(theirs[0], ours, atol=1e-4)
    assert worst_gap(engine, model, 0) < 1e-4
    engine.verify_weights(weights_of(model))


def test_verify_names_the_tensor_that_differs_or_is_lacking(
    make_engine: MakeEngine, model: PreTrainedModel
) -> None:
    engine = make_engine()
    engine.update_weights(weights_of(model), 0)
    wrong = "model.layers.2.mlp.down_proj.weight"
    lacking = "model.layers.1.input_layernorm.weight"
    weights = [(name, t + 1e-6 if name == wrong else t) for name, t in weights_of(model) if name != lacking]
    with pytest.raises(UserError, match="2 tensors differ") as caught:
        engine.verify_weights(weights)
    assert wrong in str(caught.value)
    assert lacking in str(caught.value)
    assert worst_gap(engine, model, 0) < 1e-4  # brought back from the copy


def test_servers_that_do_not_see_the_runs_directory_are_told_apart_from_wrong_weights(
    make_engine: MakeEngine, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    engine.update_weights(weights_of(model), 0)
    monkeypatch.setattr(Snapshot, "finish", Snapshot.delete)
    with pytest.raises(
        UserError, match="rollout.sglang.checksums needs servers that see the run's directory"
    ):
        engine.verify_weights(weights_of(model))
    assert worst_gap(engine, model, 0) < 1e-4  # brought back from the copy


@pytest.mark.parametrize("partial", [True, False])
def test_an_update_in_the_middle_of_generation(
    make_engine: MakeEngine, model: PreTrainedModel, partial: bool
) -> None:
    engine = make_engine(partial=partial)
    engine.update_weights(weights_of(model), 0)
    old = {name: tensor.clone() for name, tensor in weights_of(model)}
    requests = [PromptRequest(i, (5, 6, 7 + i), 0) for i in range(4)]
    groups: list[Group] = []
    consumer = threading.Thread(
        target=lambda: groups.extend(engine.generate(requests, SamplingParams(2, 600)))
    )
    consumer.start()
    threading.Event().wait(1.0)
    perturb(model, 1)
    engine.update_weights(weights_of(model), 1)
    consumer.join(240)
    assert not consumer.is_alive()
    completions = [(g.request.prompt_ids, c) for g in groups for c in g.completions]
    assert len(completions) == 8
    mixed = [len(set(c.token_versions.tolist())) == 2 for _, c in completions]
    assert any(mixed) == partial
    new_gaps = {id(c): np.abs(logprobs_of(model, p, c.token_ids) - c.logprobs) for p, c in completions}
    model.load_state_dict(old)
    for prompt_ids, completion in completions:
        old_gap = np.abs(logprobs_of(model, prompt_ids, completion.token_ids) - completion.logprobs)
        gap = np.where(completion.token_versions == 0, old_gap, new_gaps[id(completion)])
        assert gap.max() < 2e-4
        assert (np.diff(completion.token_versions) >= 0).all()


def test_a_failing_export_leaves_no_server_in_use(make_engine: MakeEngine, model: PreTrainedModel) -> None:
    engine = make_engine()
    engine.update_weights(weights_of(model), 0)

    def failing() -> Iterator[NamedTensor]:
        yield from weights_of(model)[:4]
        raise OSError("a rank has gone")

    with pytest.raises(OSError, match="a rank has gone"):
        engine.update_weights(failing(), 1)
    with pytest.raises(UserError, match="update_weights first"):
        engine.generate([PromptRequest(0, (5,), 0)], SamplingParams(1, 4))
    engine.update_weights(weights_of(model), 1)
    assert worst_gap(engine, model, 1) < 1e-4


@pytest.mark.soak
def test_a_server_restarted_without_weights_is_not_sampled_from(
    make_engine: MakeEngine, servers: Servers, model: PreTrainedModel
) -> None:
    perturb(model, 1)
    engine = make_engine()
    engine.update_weights(weights_of(model), 0)
    servers.processes[0].end()
    servers.start(0)
    assert worst_gap(engine, model, 0) < 1e-4  # the other one alone
    servers.wait()
    for _ in range(600):
        if set(engine.status().values()) == {"ready"}:
            break
        threading.Event().wait(0.1)
    assert engine.status() == dict.fromkeys(servers.urls, "ready")
    assert worst_gap(engine, model, 0) < 1e-4


def _update_from_rank_zero(urls: list[str], python: str, checkpoint: str, logs: str) -> float:
    """A rank of the trainer: its own collectives go on around an update by rank 0."""
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    if torch.distributed.get_rank() == 0:
        config = SGLangConfig(urls=tuple(urls), python=python, bucket_mb=1)
        engine = SGLangEngine(config, checkpoint, "fp32", Path(logs), "cpu")
        try:
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
            engine.update_weights(weights_of(model), 0)
            torch.distributed.all_reduce(total)
            engine.update_weights(weights_of(model), 1)
            assert worst_gap(engine, model, 1) < 1e-4
        finally:
            engine.close()
    else:
        torch.distributed.all_reduce(total)
    torch.distributed.all_reduce(total)
    return float(total)


def test_the_trainers_own_process_group_is_left_alone(
    ranks: RankPool, servers: Servers, checkpoint: Path, tmp_path: Path
) -> None:
    arguments = (servers.urls, servers.launch.python, str(checkpoint), str(tmp_path))
    assert ranks.run(2, _update_from_rank_zero, *arguments) == [8.0, 8.0]
