"""What is wrong with `model.lora` before a model is built, and what adapters cost by the plan."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gtpo_megatron.config import LoraConfig, ParallelConfig, RunConfig
from gtpo_megatron.config.loading import load_config, save_config
from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.checks import check_run, read_shape
from gtpo_megatron.plan.estimate import Plan, completion_lengths, make_plan
from gtpo_megatron.plan.facts import efficiency, find_gpu
from gtpo_megatron.plan.layout import rank_parameters, rank_state_bytes
from gtpo_megatron.plan.lora import adapter_parameters, target_sizes
from gtpo_megatron.run.identity import check_directory
from tests.plan.checking import CPU

ROOT = Path(__file__).parents[2]
RANK = 4


@pytest.fixture
def make(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., RunConfig]:
    """A run with adapters that is right but for what is given."""
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')

    def build(
        lora: dict[str, Any] | None, family: str = "llama", parallel: dict[str, Any] | None = None
    ) -> RunConfig:
        model: dict[str, Any] = {"path": str(tiny_checkpoint(family)), "dtype": "fp32"}
        return RunConfig.model_validate(
            {
                "name": "x",
                "dir": str(tmp_path / "runs"),
                "model": model | {"lora": lora},
                "data": {"path": str(tmp_path / "rows.jsonl"), "max_prompt_tokens": 32},
                "rollout": {"max_new_tokens": 32},
                "rewards": {"terms": [{"kind": "paper_format"}]},
                "parallel": parallel or {},
                "training": {"steps": 1, "micro_batch_tokens": 512},
                "optimizer": {"lr": 1e-3},
            }
        )

    return build


def problem(config: RunConfig, world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        check_run(config, world_size, CPU)
    return str(caught.value)


@pytest.mark.parametrize("targets", [["o_proj"], ["q_proj", "v_proj", "k_proj", "down_proj"]])
def test_adapters_that_the_model_can_have(targets: list[str], make: Callable[..., RunConfig]) -> None:
    check_run(make({"rank": RANK, "targets": targets}, parallel={"tensor": 2}), 2, CPU)


@pytest.mark.parametrize(
    "lora, family, parallel, said",
    [
        ({"rank": 33}, "llama", {}, "model.lora.rank: 33 is above the width of k_proj, 32"),
        ({"rank": 3}, "llama", {"tensor": 2}, "3 is not a multiple of parallel.tensor: 2"),
        (
            {"rank": 4, "dropout": 0.1},
            "llama",
            {"tensor": 2},
            "model.lora.dropout: 0.1 needs parallel.tensor: 1",
        ),
        ({"targets": ["q_proj", "v_proj"]}, "llama", {}, "q_proj, v_proj without k_proj"),
        ({"targets": ["up_proj"]}, "llama", {}, "up_proj without gate_proj"),
        ({"targets": []}, "llama", {}, "name at least one layer"),
        ({"targets": ["o_proj", "o_proj"]}, "llama", {}, "each once"),
        ({"rank": 4}, "qwen3_moe", {}, "mixture of experts; adapters are supported on dense models alone"),
        ({"path": "nowhere"}, "llama", {}, "nowhere/adapter_config.json: not an adapter in PEFT's format"),
    ],
)
def test_adapters_that_it_cannot_have(
    lora: dict[str, Any], family: str, parallel: dict[str, Any], said: str, make: Callable[..., RunConfig]
) -> None:
    assert said in problem(make(lora, family, parallel), parallel.get("tensor", 1))


def test_an_unknown_target_is_named_with_the_known_ones(make: Callable[..., RunConfig]) -> None:
    with pytest.raises(ValueError, match=r"(?s)lora\.targets\.0.*'q_proj', 'k_proj'.*lm_head"):
        make({"targets": ["lm_head"]})


def stored(directory: Path, base: Path, width: int = 64, **changes: Any) -> Path:
    """An adapter on o_proj and down_proj of a tiny model, as PEFT stores it."""
    directory.mkdir()
    tensors = {}
    for layer in range(4):
        for name, inputs in (("self_attn.o_proj", width), ("mlp.down_proj", 128)):
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = np.zeros((RANK, inputs), np.float32)
            tensors[f"{key}.lora_B.weight"] = np.zeros((width, RANK), np.float32)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": ["o_proj", "down_proj"],
    }
    (directory / "adapter_config.json").write_text(json.dumps(config | changes))
    return directory


@pytest.mark.parametrize(
    "width, changes, said",
    [
        (64, {"r": 8}, "model.lora.rank: 4, but the adapter"),
        (64, {"lora_alpha": 16}, "model.lora.alpha: 8, but the adapter"),
        (64, {"target_modules": ["o_proj"]}, "has ['o_proj']"),
        (64, {"base_model_name_or_path": "org/Another-7B"}, "of another base, org/Another-7B, not"),
        (64, {"use_rslora": True}, "use_rslora is True"),
        (64, {"peft_type": "LOHA"}, "peft_type is LOHA, not LORA"),
        (32, {}, "12 tensors are not those of this base"),
    ],
)
def test_an_adapter_of_another_kind_or_base(
    width: int,
    changes: dict[str, Any],
    said: str,
    make: Callable[..., RunConfig],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    settings = {
        "rank": RANK,
        "alpha": 8,
        "targets": ["o_proj", "down_proj"],
        "path": str(tmp_path / "adapter"),
    }
    stored(tmp_path / "adapter", tiny_checkpoint("llama"), width, **changes)
    assert said in problem(make(settings))


def test_an_adapter_that_fits_is_taken(
    make: Callable[..., RunConfig], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = {
        "rank": RANK,
        "alpha": 8,
        "targets": ["o_proj", "down_proj"],
        "path": str(tmp_path / "adapter"),
    }
    stored(tmp_path / "adapter", tiny_checkpoint("llama"))
    check_run(make(settings), 1, CPU)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "missing, damaged or cut short" in problem(make(settings))


@pytest.mark.parametrize(
    "before, after", [(None, {"rank": 4}), ({"rank": 4}, None), ({"rank": 4}, {"rank": 8})]
)
def test_a_run_with_other_adapters_is_another_run(
    before: dict[str, Any] | None, after: dict[str, Any] | None, make: Callable[..., RunConfig]
) -> None:
    first = make(before)
    check_directory(first)
    save_config(first, first.path / "config.yaml")
    check_directory(first)
    with pytest.raises(UserError, match=r"model\.lora(\.rank)?: .* there, .* here"):
        check_directory(make(after))


def test_the_cost_of_adapters(tiny_checkpoint: Callable[[str], Path]) -> None:
    shape = read_shape(str(tiny_checkpoint("llama")))
    lora, parallel = (
        LoraConfig(rank=RANK, targets=("o_proj", "down_proj")),
        ParallelConfig(pipeline=2, tensor=2),
    )
    assert target_sizes(shape)["down_proj"] == (128, 64)
    # of a stage's two layers, on one of two tensor ranks
    adapters = adapter_parameters(shape, lora, parallel, 0)
    assert adapters == 2 * RANK * ((64 + 64) + (128 + 64)) // 2
    count = rank_parameters(shape, parallel, 0)
    state = rank_state_bytes(count, parallel, 4, bf16=True, distributed_optimizer=False, adapters=adapters)
    assert state == 2 * count.total + 18 * adapters


def planned(*overlays: str) -> Plan:
    """The paper's Llama run on four GPUs, under overlays of its folder."""
    recipes = [ROOT / "recipes" / "paper" / f"{name}.yaml" for name in ("llama-3.1-8b-bf16", *overlays)]
    model = f"model.path={ROOT / 'tests' / 'fixtures' / 'configs' / 'Llama-3.1-8B-Instruct'}"
    config = load_config(recipes, [model])
    shape = read_shape(config.model.path)
    return make_plan(config, shape, 4, find_gpu("h100-sxm"), completion_lengths(config, None), efficiency())


def test_the_plan_of_a_run_with_adapters() -> None:
    full, lora = planned(), planned("lora")
    one, other = full.worst, lora.worst
    adapters = other.gradients / 4
    assert adapters == 32 * 64 * (4 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336)) / 4
    assert other.optimizer == 12 * adapters
    assert other.weights == one.weights + 2 * adapters
    assert other.activations == one.activations
    assert lora.step.training.matmul < full.step.training.matmul
    assert lora.step.training.optimizer == 0 < full.step.training.optimizer


def test_a_kl_term_costs_a_pass_and_no_weights() -> None:
    assert planned("grpo-kl", "lora").worst.weights == planned("lora").worst.weights
    assert planned("grpo-kl").worst.weights == 2 * planned().worst.weights
    assert planned("grpo-kl", "lora").step.scoring > 0
