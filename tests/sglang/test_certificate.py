"""The mismatch certificate, its figures and its bound."""

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

from gtpo_megatron.config import Fp8Config
from gtpo_megatron.errors import UserError
from gtpo_megatron.rollout.sglang.audit.certificate import certify, default_bound, mismatch
from tests.sglang.conftest import MakeEngine, Servers, logprobs_of, perturb, weights_of

NO_FP8 = Fp8Config()
MEASURED = Path(__file__).parents[2] / "docs" / "results" / "fp8-emulated.md"


def test_figures_of_a_known_difference() -> None:
    trainer = [np.array([-1.0, -2.0], np.float32), np.array([-3.0, -0.5], np.float32)]
    server = [trainer[0] + np.float32(0.5), trainer[1] - np.float32(0.25)]
    found = mismatch(server, trainer)
    assert found.tokens == 4
    assert found.mean_abs == pytest.approx(0.375)
    assert found.max_abs == pytest.approx(0.5)
    assert found.mean == pytest.approx(0.125)
    assert found.kl == pytest.approx((2 * (np.exp(-0.5) - 0.5) + 2 * (np.exp(0.25) - 1.25)) / 4, rel=1e-6)
    assert found.metrics()["mismatch/mean_abs"] == found.mean_abs


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "delayed"])
def test_an_fp8_recipe_is_allowed_about_twice_the_gap_that_was_measured(recipe: str) -> None:
    (row,) = (line for line in MEASURED.read_text("utf-8").splitlines() if f"`fp8-{recipe}`" in line)
    gap = float(row.split("|")[2])
    assert 1.7 * gap < default_bound("bf16", Fp8Config(format="hybrid", recipe=recipe)) < 2.3 * gap


def test_the_bound_and_what_is_not_a_number() -> None:
    trainer = [np.zeros(3, np.float32)]
    exact, rounded = (default_bound(dtype, NO_FP8) for dtype in ("fp32", "bf16"))
    assert exact < rounded < default_bound("bf16", Fp8Config(format="hybrid"))
    assert certify({"u": [np.full(3, 0.01, np.float32)]}, trainer, 0.02)["u"].tokens == 3
    with pytest.raises(UserError, match=r"max_logprob_gap(.|\n)*http://b: mean \|difference\| 0.03"):
        certify({"http://a": trainer, "http://b": [np.full(3, 0.03, np.float32)]}, trainer, 0.02)
    with pytest.raises(UserError, match="nan"):
        certify({"u": [np.full(3, np.nan, np.float32)]}, trainer, 0.02)
    with pytest.raises(ValueError, match="same, non-empty"):
        mismatch([np.zeros(2, np.float32)], trainer)


@pytest.mark.sglang
def test_servers_and_trainer_agree_until_the_trainer_moves_on(
    make_engine: MakeEngine, servers: Servers, model: PreTrainedModel
) -> None:
    engine = make_engine()
    engine.update_weights(weights_of(model), 0)
    sequences = [((5, 6, 7), tuple(range(10, 60))), ((9,), (4, 4, 2)), ((3,) * 40, (8,))]

    def trainer() -> list[np.ndarray]:
        return [logprobs_of(model, prompt, np.array(tokens, np.int32)) for prompt, tokens in sequences]

    scores = engine.score(sequences)
    assert list(scores) == servers.urls
    found = certify(scores, trainer(), default_bound("fp32", NO_FP8))
    assert all(m.tokens == 54 for m in found.values())
    perturb(model, 1)
    with pytest.raises(UserError, match="disagree on logprobs"):
        certify(engine.score(sequences), trainer(), default_bound("fp32", NO_FP8))
