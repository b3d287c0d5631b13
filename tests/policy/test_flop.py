"""Model FLOP against Megatron-Bridge's counter, and the bytes that a rank holds against the plan's."""

import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import pytest

from gtpo_megatron.config import ParallelConfig
from gtpo_megatron.plan.checks import read_shape
from gtpo_megatron.plan.facts import of_shape
from gtpo_megatron.plan.flop import batch_flop
from gtpo_megatron.plan.layout import rank_parameters
from tests.parallel.pool import RankPool
from tests.policy import training

CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"
MODELS = ("Llama-3.1-8B-Instruct", "Qwen2.5-32B-Instruct", "Qwen3-30B-A3B")
ROW = 512
PACKED = [100, 300, 112]  # a row of them is as long


def counted_by_bridge(model: str) -> tuple[float, float | None]:
    """Of two rows of one sequence each, and of a packed row; None where its counter knows no packed rows."""
    from transformers import AutoConfig

    from gtpo_megatron.policy import platform

    platform.install()
    # what its training reads and configures needs packages that nothing here does; the counter uses none of it
    unused = ("training.config", "data.datasets.packing_utils", "data.packing.algorithms")
    stand_ins = {f"megatron.bridge.{name}": MagicMock() for name in unused}
    with platform.importing_bridge(), patch.dict(sys.modules, stand_ins):
        from megatron.bridge import AutoBridge
        from megatron.bridge.training.utils.flop_utils import num_floating_point_operations as count

    provider = AutoBridge.from_hf_config(AutoConfig.from_pretrained(CONFIGS / model)).to_megatron_provider(
        load_weights=False
    )
    provider.seq_length, provider.make_vocab_size_divisible_by = ROW, 1
    provider.moe_permute_fusion = provider.apply_rope_fusion = False  # Transformer Engine's
    provider.finalize()
    settings: Any = SimpleNamespace(model=provider, peft=None)
    packed = None
    if "seqlen_squared_sum" in inspect.signature(count).parameters:
        packed = count(settings, 1, seqlen_sum=ROW, seqlen_squared_sum=sum(x * x for x in PACKED))
    return count(settings, 2), packed


@pytest.mark.parametrize("model", MODELS)
def test_model_flop_is_what_megatron_bridge_counts(model: str, ranks: RankPool) -> None:
    own = of_shape(read_shape(str(CONFIGS / model)), "")
    ((whole, packed),) = ranks.run(1, counted_by_bridge, model)
    router = 6 * own.expert_layers * own.hidden * own.experts  # which it leaves out
    assert batch_flop(own, [ROW, ROW]) - 2 * ROW * router == pytest.approx(whole)
    assert batch_flop(own, PACKED) < batch_flop(own, [ROW])
    if packed is not None:
        assert batch_flop(own, PACKED) - ROW * router == pytest.approx(packed)


def held(
    directory: Path, checkpoint: Path, sections: dict[str, Any]
) -> tuple[dict[str, int], dict[str, float]]:
    """Bytes on this rank after an update, and what the metrics say."""
    from gtpo_megatron.policy.memory import held_bytes
    from gtpo_megatron.run.costs import memory_metrics

    config = training.run_config(directory, checkpoint, **sections)
    policy, optimizer, _ = training.start(config)
    training.steps(config, policy, optimizer, [0])
    return held_bytes([policy], optimizer), memory_metrics(policy, None, optimizer)


@pytest.mark.parametrize(
    ("sections", "weight", "adam", "shards"),
    [
        ({}, 4, 8, 1),
        ({"model": {"dtype": "bf16"}, "parallel": {"pipeline": 2}}, 2, 12, 1),
        ({"model": {"dtype": "bf16"}, "optimizer": {"distributed": True}}, 2, 12, 2),
        ({"optimizer": {"distributed": True}}, 4, 8, 2),
    ],
)
def test_a_rank_holds_what_the_plan_says(
    sections: dict[str, Any],
    weight: int,
    adam: int,
    shards: int,
    ranks: RankPool,
    tmp_path: Path,
    tiny_checkpoint: Any,
) -> None:
    checkpoint = tiny_checkpoint("llama")
    layout = ParallelConfig(**sections.get("parallel", {}))
    found = ranks.run(2, held, tmp_path, checkpoint, sections)
    for rank, (by_part, metrics) in enumerate(found):
        stage = rank if layout.pipeline > 1 else 0
        parameters = rank_parameters(read_shape(str(checkpoint)), layout, stage).total
        assert by_part["weights"] == weight * parameters
        # buffers are padded, and Adam counts its steps
        assert by_part["gradients"] == pytest.approx(4 * parameters, rel=0.01)
        assert by_part["optimizer"] == pytest.approx(adam * parameters / shards, rel=0.02)
        for part in by_part:
            largest = max(other[part] for other, _ in found)
            assert metrics[f"memory/{part}_gib"] == largest / 2**30
        assert metrics["memory/peak_gib"] > sum(by_part.values()) / 2**30
