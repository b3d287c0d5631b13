"""Conversions: bit-exact round trips over families and layouts, with a proof that fails when anything is wrong."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gtpo_megatron.config import ParallelConfig
from gtpo_megatron.errors import UserError
from tests.policy import training


def to_megatron(source: Path, output: Path, parallel: dict[str, Any], dtype: str) -> Any:
    from gtpo_megatron.policy.exchange import convert

    layout = ParallelConfig(**parallel)
    convert.start_ranks(layout)
    return convert.hf_to_megatron(source, output, layout, dtype)


def to_hf(
    source: Path, output: Path, parallel: dict[str, Any], dtype: str | None, shard_bytes: int = 100_000
) -> Any:
    from gtpo_megatron.policy.exchange import convert

    layout = ParallelConfig(**parallel)
    convert.start_ranks(layout)
    return convert.megatron_to_hf(source, output, layout, dtype, shard_bytes=shard_bytes)


def verify(a: Path, b: Path) -> Any:
    from gtpo_megatron.policy.exchange import convert

    convert.start_ranks(ParallelConfig())
    return convert.verify_only(a, b, ParallelConfig())


def rewrite(source: Path, output: Path, parallel: dict[str, Any]) -> Any:
    from gtpo_megatron.policy.exchange import convert

    layout = ParallelConfig(**parallel)
    convert.start_ranks(layout)
    return convert.reshard(source, output, layout)


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


ROUND_TRIPS = [
    ("llama", (1, {}), (4, {"tensor": 2, "pipeline": 2})),
    ("llama3", (2, {"pipeline": 2}), (1, {})),
    ("qwen2", (4, {"tensor": 2, "pipeline": 2}), (2, {"tensor": 2})),
    ("qwen2_tied", (2, {"tensor": 2}), (2, {"pipeline": 2})),
    ("qwen3", (2, {"tensor": 2, "sequence": True}), (2, {"pipeline": 2, "virtual_pipeline": 2})),
    ("qwen3_moe", (2, {"expert": 2}), (2, {"tensor": 2})),
]


@pytest.mark.parametrize(("family", "there", "back"), ROUND_TRIPS, ids=[family for family, *_ in ROUND_TRIPS])
def test_round_trip_is_bit_exact(
    ranks: Any, tiny_checkpoint: Any, tmp_path: Path, family: str, there: tuple, back: tuple
) -> None:
    source = tiny_checkpoint(family)
    proof, *_ = ranks.run(there[0], to_megatron, source, tmp_path / "megatron", there[1], "fp32")
    assert proof.holds and proof.max_logit_difference is not None
    ranks.run(back[0], to_hf, tmp_path / "megatron", tmp_path / "hf", back[1], None)
    expected, found = weights_of(source), weights_of(tmp_path / "hf")
    assert expected.keys() == found.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name]), name
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    record = json.loads((tmp_path / "hf" / "conversion.json").read_text())
    assert (
        record["holds"]
        and record["checksums"].keys() == expected.keys()
        and record["peak_memory_gib_of_a_rank"] > 0
    )
    assert {p.name for p in tmp_path.iterdir()} == {"megatron", "hf"}


def train_and_save(config: Any) -> None:
    policy, optimizer, checkpointer = training.start(config)
    training.steps(config, policy, optimizer, range(2))
    checkpointer.save(training.state(2))


def test_a_training_checkpoint_is_exported_without_the_original(
    ranks: Any, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    original = shutil.copytree(tiny_checkpoint("qwen2"), tmp_path / "original")
    config = training.run_config(
        tmp_path,
        original,
        parallel={"tensor": 2, "pipeline": 2},
        model={"dtype": "bf16"},
        optimizer={"distributed": True},
    )
    ranks.run(4, train_and_save, config)
    shutil.rmtree(original)
    latest = config.path / "checkpoints" / "latest"
    (proof,) = ranks.run(1, to_hf, latest, tmp_path / "hf", {}, None)
    assert proof.holds
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token == "<|im_end|>"
    assert (tmp_path / "hf" / "generation_config.json").is_file()
    ranks.run(2, to_hf, latest, tmp_path / "hf32", {"pipeline": 2}, "fp32")
    narrow, wide = weights_of(tmp_path / "hf"), weights_of(tmp_path / "hf32")
    assert all(torch.equal(wide[name], narrow[name].float()) for name in narrow)
    assert wide["lm_head.weight"].dtype == torch.float32


def go_on(config: Any) -> list:
    policy, optimizer, checkpointer = training.start(config)
    assert checkpointer.load_latest() == training.state(2)
    return training.steps(config, policy, optimizer, range(2, 4))


def test_a_resharded_training_checkpoint_trains_on(ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    config = training.run_config(tmp_path, tiny_checkpoint("llama"))
    ranks.run(1, train_and_save, config)
    checkpoint = config.path / "checkpoints" / "step-000002"
    ranks.run(
        2, rewrite, checkpoint, tmp_path / "other" / "run" / "checkpoints" / "step-000002", {"tensor": 2}
    )
    (expected,) = ranks.run(1, go_on, config)
    (found,) = ranks.run(1, go_on, config.model_copy(update={"dir": str(tmp_path / "other")}))
    assert found == expected


def test_verify_only_finds_one_changed_bit(ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    changed = shutil.copytree(source, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    weights[name][0, 0] = torch.nextafter(weights[name][0, 0], torch.tensor(1e9))
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    (proof,) = ranks.run(1, verify, source, changed)
    assert not proof.holds and proof.different == [name]
    assert ranks.run(1, verify, source, source)[0].holds


def refused(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except UserError as error:
        return str(error)
    return "not refused"


def convert_with_a_wrong_weight(source: Path, output: Path) -> str:
    """A converter that swaps two values must be caught by its proof."""
    from gtpo_megatron.policy.exchange import convert

    genuine = convert.open_policy

    def wrong(*args: Any, **kwargs: Any) -> Any:
        policy = genuine(*args, **kwargs)
        weight = next(policy.chunks[0].parameters())
        weight.data[0], weight.data[1] = weight.data[1].clone(), weight.data[0].clone()
        return policy

    convert.open_policy = wrong
    try:
        return refused(to_megatron, source, output, {}, "fp32")
    finally:
        convert.open_policy = genuine


def test_a_wrong_conversion_is_an_error_and_leaves_nothing(
    ranks: Any, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    (message,) = ranks.run(1, convert_with_a_wrong_weight, tiny_checkpoint("llama"), tmp_path / "out")
    assert re.search(r"DIFFERENT 1 \(model.embed_tokens.weight\)", message)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_source_is_named(ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "source")
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    (message,) = ranks.run(1, refused, to_megatron, source, tmp_path / "out", {}, "fp32")
    assert str(source) in message
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_not_touched(ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    (message,) = ranks.run(1, refused, to_megatron, tiny_checkpoint("llama"), tmp_path, {}, "fp32")
    assert "exists already" in message
