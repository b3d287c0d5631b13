"""Entropies of `compat: reference`, -sum p ln max(p, floor): the head's, and a step's that asks for them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gtpo_megatron import algorithm
from gtpo_megatron.algorithm import REFERENCE_ENTROPY_FLOOR, REFERENCE_GAMMA, REFERENCE_THRESHOLD
from gtpo_megatron.policy.head import token_statistics
from tests.parallel.pool import RankPool
from tests.policy import test_head_tensor_parallel as shards
from tests.policy.test_head import ROWS, VOCABULARY, gradients, make

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "golden.json").read_text("utf-8")
)["cases"]
WITH_LOGITS = [index for index, case in enumerate(CASES) if case["logits"]]
STEP_FLOOR = 1e-2  # high enough to show in a tiny model's flat distributions


def definition(logits: Tensor, floor: float) -> Tensor:
    p = logits.softmax(-1)
    return -(p * p.clamp(min=floor).log()).sum(-1)


@pytest.mark.parametrize("tile", [(None, None), (10, 17), (1, 1)])
@pytest.mark.parametrize("floor", [1e-6, 1e-2])
def test_exact_in_float64_and_without_a_trace_in_the_gradient(
    tile: tuple[int | None, int | None], floor: float
) -> None:
    hidden, weight, targets = make(scale=3.0, rows=ROWS if tile != (1, 1) else 7)
    options = dict(vocab_size=VOCABULARY, temperature=0.6, token_tile=tile[0], vocab_tile=tile[1])
    statistics = token_statistics(hidden, weight, targets, entropy_floor=floor, **options)
    plain = token_statistics(hidden, weight, targets, **options)
    expected = definition((hidden @ weight[:VOCABULARY].t()).detach() / 0.6, floor)
    assert (expected - plain.entropy).abs().max() > 1e-7  # the floor matters here
    torch.testing.assert_close(statistics.entropy, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(statistics.logprobs, plain.logprobs)
    assert not statistics.entropy.requires_grad
    for ours, theirs in zip(
        gradients(statistics, hidden, weight), gradients(plain, hidden, weight), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_precision(dtype: torch.dtype) -> None:
    hidden, weight, targets = (x.detach() for x in make(dtype, scale=3.0))
    statistics = token_statistics(hidden, weight, targets, vocab_size=VOCABULARY, entropy_floor=1e-2)
    expected = definition(hidden.double() @ weight[:VOCABULARY].double().t(), 1e-2)
    torch.testing.assert_close(statistics.entropy.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"entropy_floor": 0.0}, {"entropy_floor": 1e-6, "entropy_grad": True}])
def test_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="entropy_floor"):
        token_statistics(*make(), vocab_size=VOCABULARY, **options)


@pytest.mark.parametrize("index", WITH_LOGITS)
def test_golden_loss_and_gradient(index: int) -> None:
    """The hidden states are the case's logits, the output weight is the identity: the authors' loss and gradient."""
    case = CASES[index]
    lengths = torch.tensor([len(row) for row in case["completions"]])
    hidden = torch.tensor(sum(case["logits"], []), dtype=torch.float64, requires_grad=True)
    targets = torch.tensor(sum(case["completions"], []))
    statistics = token_statistics(
        hidden,
        torch.eye(case["vocab"], dtype=torch.float64),
        targets,
        vocab_size=case["vocab"],
        entropy_floor=REFERENCE_ENTROPY_FLOOR,
        token_tile=4,
        vocab_tile=2,
    )

    def padded(values: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(values.split(lengths.tolist()), batch_first=True)

    prefix, suffix = torch.tensor(case["prefix"]), torch.tensor(case["suffix"])
    advantages = torch.tensor(case["advantages"], dtype=torch.float64)
    entropy = padded(statistics.entropy).sum(1) / lengths
    loss = algorithm.gtpo_loss(
        padded(statistics.logprobs),
        entropy,
        padded(torch.tensor(sum(case["weights_reference"], []), dtype=torch.float64)),
        advantages,
        lengths,
        algorithm.entropy_gate(entropy, float("nan"), REFERENCE_THRESHOLD, "always"),
        REFERENCE_GAMMA,
        algorithm.completion_normalizers(torch.zeros_like(lengths), prefix, suffix, "reference"),
    )
    loss.backward()
    assert loss.item() == pytest.approx(case["loss_reference"], abs=1e-9)
    assert hidden.grad.norm().item() == pytest.approx(case["grad_norm_reference"], abs=1e-9)


def run_shard(rows: int) -> dict[str, Any]:
    """Entropy from this rank's shard of the vocabulary, and the all-reduces it took part in."""
    import torch.distributed as dist

    hidden, weight, targets, _ = shards.make(rows, torch.float64)
    shard = weight.chunk(dist.get_world_size())[dist.get_rank()]
    counted = shards.CountedAllReduces()
    with counted:
        entropy = token_statistics(
            3 * hidden,
            shard,
            targets,
            vocab_size=shards.VOCABULARY,
            tp_group=dist.group.WORLD,
            entropy_floor=1e-6,
            token_tile=10,
            vocab_tile=13,
        ).entropy
    expected = definition(3 * hidden @ weight[: shards.VOCABULARY].t(), 1e-6)
    return {"difference": (entropy - expected).abs().sum().item(), "reduced": counted.operations}


@pytest.mark.parametrize("size", [2, 4])
def test_shards_equal_the_definition(ranks: RankPool, size: int) -> None:
    """On 4 ranks the last shard is padding throughout."""
    for result in ranks.run(size, run_shard, shards.ROWS):
        assert result["difference"] < 1e-11
        rows = shards.ROWS
        assert result["reduced"] == [("MAX", rows), ("SUM", 3 * rows), ("SUM", rows)]


def test_ranks_without_tokens_take_part(ranks: RankPool) -> None:
    for result in ranks.run(2, run_shard, 0):
        assert result["reduced"] == [("MAX", 0), ("SUM", 0), ("SUM", 0)]


def run_step(checkpoint: Path, tensor: int) -> list[float]:
    """Mean entropy of each completion, from a training pass whose objective asks for the floor."""
    from megatron.core import parallel_state

    from gtpo_megatron.config import AlgorithmConfig, ModelConfig, ParallelConfig, TrainingConfig
    from gtpo_megatron.policy import platform
    from gtpo_megatron.policy.model import build_policy, initialize_parallel
    from gtpo_megatron.policy.objective import BatchConstants, Objective, completion_report, make_objective
    from gtpo_megatron.policy.step import forward_backward, pack
    from gtpo_megatron.trajectories.shares import BatchTable
    from tests.parallel.layout_job import sample_batch

    parallel = ParallelConfig(tensor=tensor)
    initialize_parallel(parallel, seed=0)
    group = parallel_state.get_context_parallel_group()
    policy = build_policy(ModelConfig(path=str(checkpoint), dtype="fp32"), parallel, TrainingConfig(steps=1))
    batch = sample_batch()
    config = AlgorithmConfig(compat="reference")
    constants = BatchConstants.of(BatchTable.of(batch), config, platform.device())
    assert make_objective(config, constants, 0.0, group).entropy_floor == REFERENCE_ENTROPY_FLOOR
    assert make_objective(AlgorithmConfig(), constants, 0.0, group).entropy_floor is None

    objective = Objective(lambda b, s: (s.logprobs.sum(), completion_report(b, s, group)), STEP_FLOOR)
    passed = forward_backward(policy, pack(policy, batch, parallel, 128), objective, len(batch))
    return passed.completions["entropy"].tolist()


@pytest.mark.parametrize("tensor", [1, 2])
def test_step_gives_the_objective_what_it_asks_for(
    ranks: RankPool, tiny_checkpoint: Any, tensor: int
) -> None:
    from transformers import AutoModelForCausalLM

    from tests.parallel.layout_job import sample_batch

    checkpoint = tiny_checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    expected, exact = [], []
    for trajectory in sample_batch():
        ids = torch.tensor([*trajectory.prompt_ids, *trajectory.token_ids])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(trajectory.prompt_ids) - 1 : -1]
        expected.append(definition(logits, STEP_FLOOR).mean().item())
        exact.append(definition(logits, 1e-30).mean().item())
    assert min(a - b for a, b in zip(exact, expected, strict=True)) > 0.01
    for entropies in ranks.run(tensor, run_step, checkpoint, tensor):
        assert entropies == pytest.approx(expected, rel=1e-5)
