"""What a step's metrics say of its costs: operations by passes, rates, MFU where the GPU is known."""

from dataclasses import replace
from pathlib import Path

import pytest

from gtpo_megatron.config import AlgorithmConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.checks import read_shape
from gtpo_megatron.plan.facts import find_gpu, gpu_names, gpu_of_device, of_shape
from gtpo_megatron.plan.flop import batch_flop
from gtpo_megatron.run.costs import Costs, Flow, Passes, speed_metrics
from gtpo_megatron.run.facts import RunFacts, read_facts

SHAPE = read_shape(str(Path(__file__).parents[1] / "fixtures" / "configs" / "Llama-3.1-8B-Instruct"))
FACTS = RunFacts(16, 8, {"tensor": 2}, "NVIDIA H100 80GB HBM3", SHAPE)
LENGTHS, SECONDS = [1000, 3000], {"rollout": 5.0, "training": 2.0, "weights": 1.0}
COSTS = Costs(Passes(0, 1), {"memory/peak_gib": 3.0}, Flow(3200, 4.0))


def test_a_step_is_counted_by_its_passes() -> None:
    model = of_shape(SHAPE, "")
    once, products = batch_flop(model, LENGTHS), 6 * 4000 * (model.dense_parameters + model.head_parameters)
    attention = (
        6 * 32 * 2 * 4096 * (1000**2 + 3000**2) / 2
    )  # two products, of each token with those before it
    assert once == pytest.approx(products + attention)

    def flop(passes: Passes, *, frozen: bool = False) -> float:
        return speed_metrics(FACTS, replace(COSTS, passes=passes), None, LENGTHS, SECONDS, frozen=frozen)[
            "model_flop"
        ]

    assert flop(Passes(0, 1)) == once
    assert flop(Passes(3, 2)) == pytest.approx(3 * once)
    assert flop(Passes(0, 1), frozen=True) == pytest.approx(once - products / 3)


def test_passes_follow_from_the_algorithm() -> None:
    gtpo = AlgorithmConfig()
    assert Passes.of(gtpo, first=True, updates=1) == Passes(1, 1)
    assert Passes.of(gtpo, first=False, updates=1) == Passes(0, 1)
    grpo = AlgorithmConfig(name="grpo", updates_per_batch=3, kl_beta=0.1)
    assert Passes.of(grpo, first=True, updates=2) == Passes(2, 2)  # the third update was not tried
    sft = AlgorithmConfig(name="sft")
    assert Passes.of(sft, first=True, updates=1) == Passes(0, 1)


def test_rates_of_a_step() -> None:
    found = speed_metrics(FACTS, COSTS, Flow(16e9, 0.5), LENGTHS, SECONDS)
    assert found["tokens"] == 4000 and found["world_size"] == 16
    assert found["tokens_per_second"] == 500
    assert found["speed/tokens_per_second_per_rank"] == 500 / 16
    assert found["speed/sampling_tokens_per_second"] == 800
    assert found["speed/weights_gb_per_second"] == 32
    assert found["memory/peak_gib"] == 3.0
    peak = 16 * find_gpu("h100-sxm").bf16
    assert found["speed/mfu_training"] == pytest.approx(found["model_flop"] / 2 / peak)
    assert found["speed/mfu_step"] == pytest.approx(found["model_flop"] / 8 / peak)


@pytest.mark.parametrize("device", ["cpu", "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"])
def test_where_the_gpu_is_not_known_there_is_no_mfu(device: str) -> None:
    found = speed_metrics(replace(FACTS, device=device), COSTS, None, LENGTHS, SECONDS)
    assert not [name for name in found if "mfu" in name]
    assert found["model_flop"] > 0


def test_a_batch_that_was_read_back_has_no_speed_of_sampling() -> None:
    found = speed_metrics(FACTS, replace(COSTS, sampled=None), None, LENGTHS, SECONDS)
    assert not found.keys() & {"speed/sampling_tokens_per_second", "speed/weights_gb_per_second"}


def test_facts_are_read_back(tmp_path: Path) -> None:
    FACTS.write(tmp_path)
    assert read_facts(tmp_path) == FACTS
    assert (FACTS.nodes, FACTS.gpu) == (2, find_gpu("h100-sxm"))
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"shape": {}}', '{"shape": 3}', "\x00"])
def test_damaged_facts_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json: damaged"):
        read_facts(tmp_path)


def test_without_facts_it_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.json: no such file"):
        read_facts(tmp_path)


def test_every_name_of_a_device_is_of_one_gpu() -> None:
    assert {gpu_of_device(name).name for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200")} <= set(gpu_names())
