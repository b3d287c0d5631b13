"""Checkpoints of policies of Transformer Engine's layers and its Adam: a resumed run is the uninterrupted one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.policy.test_checkpoint import load_and_go_on, save_and_go_on
from tests.te import jobs


@pytest.mark.parametrize(
    ("distributed", "model"),
    [
        (False, {"dtype": "fp32"}),
        (False, {"dtype": "bf16", "fp8": "hybrid"}),
        (True, {"dtype": "bf16", "fp8": {"format": "e4m3", "recipe": "blockwise"}}),
        (False, {"dtype": "bf16", "fp8": {"format": "hybrid", "recipe": "delayed"}}),
    ],
)
def test_resume_is_exact(
    te_ranks: Any, te_checkpoint: Any, tmp_path: Path, distributed: bool, model: dict[str, Any]
) -> None:
    config = jobs.run_config(
        tmp_path, te_checkpoint("llama"), model=model, optimizer={"distributed": distributed}
    )
    metrics, weights, _ = te_ranks.run(1, save_and_go_on, config)[0]
    resumed, resumed_weights, _, _ = te_ranks.run(1, load_and_go_on, config)[0]
    assert resumed == metrics
    for name, weight in weights.items():
        np.testing.assert_array_equal(resumed_weights[name], weight, err_msg=name)
