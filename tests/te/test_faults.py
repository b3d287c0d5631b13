"""What would have ended a first run on a GPU, with what now keeps it from doing so, and without."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from gtpo_megatron.config import RunConfig
from tests.policy import training
from tests.te import jobs


def built_deterministic(config: RunConfig, asked: bool) -> None:
    """Build a policy as training.deterministic does on a GPU; without `asked`, kernels that are not stay allowed."""
    from gtpo_megatron.policy import model, platform

    configure = model._configure

    def deterministic(provider: Any, *rest: Any) -> None:
        configure(provider, *rest)
        provider.deterministic_mode = True

    with (
        patch.dict("os.environ", {platform.DETERMINISM: "1"}),
        patch.object(model, "_configure", deterministic),
        patch.object(
            platform,
            "use_deterministic_kernels",
            platform.use_deterministic_kernels if asked else lambda: None,
        ),
    ):
        training.start(config)


def test_deterministic_layers_are_built(te_ranks: Any, te_checkpoint: Any, tmp_path: Path) -> None:
    config = jobs.run_config(tmp_path, te_checkpoint("llama"))
    te_ranks.run(1, built_deterministic, config, True)
    with pytest.raises(AssertionError, match="NVTE_ALLOW_NONDETERMINISTIC_ALGO is not 0"):
        te_ranks.run(1, built_deterministic, config, False)


def scored(config: RunConfig, alignment: int | None) -> list[int]:
    """Tokens of the logprobs of a batch, its sequences padded as the policy has it or to `alignment`."""
    from gtpo_megatron.policy.step import token_logprobs

    policy, _, _ = training.start(config)
    policy = policy if alignment is None else replace(policy, alignment=alignment)
    budget = config.training.micro_batch_tokens
    found = token_logprobs(policy, training.batch(0), config.parallel, budget, temperature=1.0)
    return [len(values) for values in found]


def test_rows_have_the_sizes_that_fp8_products_take(
    te_ranks: Any, te_checkpoint: Any, tmp_path: Path
) -> None:
    model = {"dtype": "bf16", "fp8": "hybrid"}
    config = jobs.run_config(tmp_path, te_checkpoint("llama"), model=model)
    (found,) = te_ranks.run(1, scored, config, None)
    assert found == [t.length for t in training.batch(0)]
    with pytest.raises(AssertionError, match="FP8 execution requires|not multiples of 16"):
        te_ranks.run(1, scored, config, 1)
