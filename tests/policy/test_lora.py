"""LoRA: the policy with adapters against transformers with peft, layouts, resume, and what a run leaves for others."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gtpo_megatron.config import RunConfig
from gtpo_megatron.plan.checks import read_shape
from gtpo_megatron.plan.lora import adapter_parameters
from tests.parallel.pool import RankPool
from tests.policy.lora_jobs import (
    TEMPERATURE,
    build_error,
    kept_bytes,
    passes,
    resume,
    resume_error,
    train_and_export,
    train_and_save,
)
from tests.policy.training import batch, run_config
from tests.tiny_models import make_tiny_checkpoint

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 4, 10
LAYOUTS = {
    "tp2": (2, dict(tensor=2), {}),
    "tp2-sp": (2, dict(tensor=2, sequence=True), {}),
    "pp2-vpp2": (2, dict(pipeline=2, virtual_pipeline=2), {}),
    "dp2": (2, dict(), {}),
    "cp2": (2, dict(context=2), {}),
    "tp2-pp2-sp": (4, dict(tensor=2, pipeline=2, sequence=True), {}),
    "recompute-full": (1, dict(), dict(recompute="full")),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("base"), "qwen2", initializer_range=0.04)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peft_adapter(base, ALL, tmp_path_factory.mktemp("adapter"))


def peft_adapter(base: Path, targets: list[str], directory: Path) -> Path:
    """An adapter that peft made and wrote, with a B that is not zero."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = PeftConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=targets)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    model.save_pretrained(directory)
    return directory


def lora_config(
    directory: Path, base: Path, lora: dict[str, Any] | None = None, **sections: Any
) -> RunConfig:
    """A run with adapters of RANK on all layers."""
    settings = {"rank": RANK, "alpha": ALPHA, **(lora or {})}
    model = {"path": str(base), "dtype": "fp32", "lora": settings, **sections.pop("model", {})}
    return run_config(directory, base, model=model, **sections)


def logprobs_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Token logprobs of the completions of `batch(0)`, by transformers."""
    result = []
    for t in batch(0):
        ids = torch.from_numpy(np.concatenate([t.prompt_ids, t.token_ids])).long()
        logprobs = (model(ids[None]).logits[0] / TEMPERATURE).log_softmax(-1)
        before = torch.arange(len(t.prompt_ids) - 1, len(ids) - 1)
        result.append(logprobs[before, ids[before + 1]])
    return result


def peft_model(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True, autocast_adapter_dtype=False).eval()


def values(parts: list[Any]) -> np.ndarray:
    return np.concatenate([p.detach().numpy() if isinstance(p, torch.Tensor) else p for p in parts])


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "k_proj", "v_proj"], ["down_proj"]], ids="-".join)
def test_logprobs_and_gradients_are_those_of_peft(
    targets: list[str], base: Path, ranks: RankPool, tmp_path: Path
) -> None:
    adapter = peft_adapter(base, targets, tmp_path / "adapter")
    config = lora_config(tmp_path, base, {"targets": targets, "path": str(adapter)})
    (found,) = ranks.run(1, passes, config)
    model = peft_model(base, adapter)
    expected = logprobs_of(model)
    np.testing.assert_allclose(values(found["logprobs"]), values(expected), rtol=0, atol=2e-5)
    np.testing.assert_array_equal(values(found["logprobs"]), values(found["again"]))
    with torch.no_grad(), model.disable_adapter():
        without = values(logprobs_of(model))
    np.testing.assert_allclose(values(found["base"]), without, rtol=0, atol=2e-5)
    assert np.abs(values(expected) - without).max() > 0.01

    (-torch.cat(expected).sum()).backward()
    gradients = {
        name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.grad is not None
    }
    assert gradients.keys() == found["gradients"].keys()
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        np.testing.assert_allclose(
            found["gradients"][name], gradient.numpy(), rtol=0, atol=1e-4 * scale, err_msg=name
        )


@pytest.fixture(scope="module")
def float64(request: pytest.FixtureRequest) -> bool:
    """Whether layouts are compared in float64, which Transformer Engine lacks."""
    return request.config.getoption("--layers") == "auto"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_equals_one_process(
    layout: str, base: Path, adapter: Path, ranks: RankPool, tmp_path: Path, float64: bool
) -> None:
    compare(ranks, base, adapter, tmp_path, *LAYOUTS[layout], float64)


def test_a_tied_output_layer_on_two_stages(ranks: RankPool, tmp_path: Path, float64: bool) -> None:
    base = make_tiny_checkpoint(tmp_path / "base", "qwen2_tied", initializer_range=0.04)
    adapter = peft_adapter(base, ALL, tmp_path / "adapter")
    compare(ranks, base, adapter, tmp_path, 2, dict(pipeline=2), {}, float64)


def compare(
    ranks: RankPool,
    base: Path,
    adapter: Path,
    tmp_path: Path,
    world: int,
    parallel: dict[str, Any],
    training: dict[str, Any],
    float64: bool,
) -> None:
    (expected,) = ranks.run(1, passes, lora_config(tmp_path, base, {"path": str(adapter)}), float64)
    config = lora_config(tmp_path, base, {"path": str(adapter)}, parallel=parallel, training=training)
    whole = np.sqrt(sum(float((gradient**2).sum()) for gradient in expected["gradients"].values()))
    rounding = 1e-6 if float64 else 1e-5  # the head returns float32
    for found in ranks.run(world, passes, config, float64):
        for kind in ("logprobs", "base"):
            np.testing.assert_allclose(values(found[kind]), values(expected[kind]), rtol=0, atol=rounding)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-9 if float64 else 1e-6)
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            difference = np.linalg.norm(found["gradients"][name] - gradient)
            assert difference <= (1e-9 * np.linalg.norm(gradient) if float64 else 1e-5 * whole), name


def test_new_adapters_are_the_same_in_every_layout_and_compute_the_base(
    base: Path, ranks: RankPool, tmp_path: Path
) -> None:
    (one,) = ranks.run(1, passes, lora_config(tmp_path, base))
    two = ranks.run(4, passes, lora_config(tmp_path, base, parallel={"tensor": 2, "pipeline": 2}))[0]
    np.testing.assert_array_equal(values(one["logprobs"]), values(one["base"]))
    assert one["adapters"].keys() == two["adapters"].keys()
    for name, weight in one["adapters"].items():
        np.testing.assert_array_equal(two["adapters"][name], weight, err_msg=name)
        if ".lora_A." in name:
            bound = 1 / np.sqrt(weight.shape[1])
            assert 0.8 * bound < np.abs(weight).max() <= bound
        else:
            assert not weight.any()
    first = [weight for name, weight in one["adapters"].items() if "q_proj.lora_A" in name]
    assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed-optimizer"])
def test_a_run_goes_on_exactly_from_its_adapters(
    distributed: bool, base: Path, ranks: RankPool, tmp_path: Path
) -> None:
    config = lora_config(tmp_path, base, {"dropout": 0.1}, optimizer={"distributed": distributed})
    (expected,) = ranks.run(1, train_and_save, config, 2, 2)
    (found,) = ranks.run(1, resume, config, 2, 2)
    assert found["steps"] == expected["steps"]
    for part in ("saved", "adapters"):
        for name, weight in expected[part].items():
            np.testing.assert_array_equal(found[part][name], weight, err_msg=name)
    assert any((expected["saved"][n] != w).any() for n, w in expected["adapters"].items())
    (folder,) = (config.path / "checkpoints").glob("step-*")
    stored = sum(path.stat().st_size for path in (folder / "weights").iterdir())
    assert stored < (base / "model.safetensors").stat().st_size  # with Adam's state: without the base


@pytest.mark.parametrize(
    "saved, loaded", [({}, {"tensor": 2}), ({"tensor": 2, "sequence": True}, {"pipeline": 2})]
)
def test_another_layout_reads_the_adapters(
    saved: dict[str, Any], loaded: dict[str, Any], base: Path, ranks: RankPool, tmp_path: Path
) -> None:
    config = lora_config(tmp_path, base, parallel=saved)
    expected = ranks.run(config.parallel.tensor, train_and_save, config, 2, 1)[0]
    found = ranks.run(2, resume, lora_config(tmp_path, base, parallel=loaded), 2, 1)[0]
    for name, weight in expected["saved"].items():
        np.testing.assert_array_equal(found["saved"][name], weight, err_msg=name)
    np.testing.assert_allclose(found["steps"], expected["steps"], rtol=1e-4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_peft_and_transformers_load_what_a_run_leaves(
    dtype: str, base: Path, ranks: RankPool, tmp_path: Path
) -> None:
    config = lora_config(
        tmp_path, base, model={"dtype": dtype}, parallel={"tensor": 2}, optimizer={"warmup_steps": 0}
    )
    results = ranks.run(2, train_and_export, config, 2)
    tolerance = 2e-5 if dtype == "fp32" else 0.1
    with torch.no_grad():
        before = values(logprobs_of(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()))
        merged = AutoModelForCausalLM.from_pretrained(config.path / "hf", dtype=torch.float32).eval()
        of_merged = values(logprobs_of(merged))
        of_adapter = values(logprobs_of(peft_model(base, config.path / "adapter")))
    for found in results:
        ours = values(found["logprobs"])
        np.testing.assert_allclose(ours, of_merged, rtol=0, atol=tolerance)
        np.testing.assert_allclose(ours, of_adapter, rtol=0, atol=tolerance)
    assert np.abs(of_merged - before).max() > 10 * tolerance
    written = load_file(config.path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in written.values()} == {torch.float32 if dtype == "fp32" else torch.bfloat16}
    described = json.loads((config.path / "adapter" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["base_model_name_or_path"]) == (
        RANK,
        ALPHA,
        str(base),
    )
    # and a run starts from it where this one ended
    again = lora_config(tmp_path, base, {"path": str(config.path / "adapter")}, model={"dtype": dtype})
    (started,) = ranks.run(1, passes, again)
    for name, weight in results[0]["adapters"].items():
        np.testing.assert_array_equal(started["adapters"][name], weight, err_msg=name)


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}], ids=["tp1", "tp2"])
def test_the_base_has_neither_gradient_buffers_nor_optimizer_state(
    parallel: dict[str, Any], base: Path, ranks: RankPool, tmp_path: Path
) -> None:
    config = lora_config(tmp_path, base, parallel=parallel)
    found = ranks.run(config.parallel.tensor, kept_bytes, config, True)[-1]
    planned = adapter_parameters(read_shape(str(base)), config.model.lora, config.parallel, 0)
    assert found["adapters"] == 4 * planned > 0
    assert found["base"] > 4 * found["adapters"]
    assert found["adapters"] <= found["gradients"] < 1.1 * found["adapters"]  # buffers are padded
    assert found["moments"] == 2 * found["adapters"]


def test_a_frozen_policy_keeps_no_gradient_buffers(base: Path, ranks: RankPool, tmp_path: Path) -> None:
    (frozen,) = ranks.run(1, kept_bytes, run_config(tmp_path, base), False)
    (trained,) = ranks.run(1, kept_bytes, run_config(tmp_path, base), True)
    assert frozen["gradients"] == 0 and frozen["base"] == trained["base"]
    assert trained["gradients"] >= trained["base"]


def test_a_full_run_and_one_with_adapters_do_not_read_each_others_checkpoints(
    base: Path, ranks: RankPool, tmp_path: Path
) -> None:
    full, lora = run_config(tmp_path / "full", base), lora_config(tmp_path / "lora", base)
    ranks.run(1, train_and_save, full, 1, 0)
    ranks.run(1, train_and_save, lora, 1, 0)
    for config, directory in ((full, lora.dir), (lora, full.dir)):
        (message,) = ranks.run(1, resume_error, config.model_copy(update={"dir": directory}))
        assert "checkpoint is of another model" in message and "adapter" in message


def test_an_adapter_of_other_layers_is_refused(
    base: Path, adapter: Path, ranks: RankPool, tmp_path: Path
) -> None:
    config = lora_config(tmp_path, base, {"targets": ["down_proj"], "path": str(adapter)})
    (message,) = ranks.run(1, build_error, config)
    assert "model.lora.path" in message and "0 are missing" in message and "48 unknown" in message


def test_an_adapter_of_another_width_is_refused(adapter: Path, ranks: RankPool, tmp_path: Path) -> None:
    other = make_tiny_checkpoint(tmp_path / "wide", "qwen2", hidden_size=128, num_attention_heads=4)
    config = lora_config(tmp_path, other, {"path": str(adapter)})
    (message,) = ranks.run(1, build_error, config)
    assert "of another base or rank" in message
