"""The planner's rates from a run: a machine whose rates are known is found again from what it would have measured."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gtpo_megatron.commands.cli import main
from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.facts import Efficiency, efficiency, find_gpu
from gtpo_megatron.plan.layout import model_parameters
from gtpo_megatron.scaling.calibrate import calibrate
from gtpo_megatron.scaling.measured import Measured, measure
from gtpo_megatron.scaling.study import expected
from tests.scaling.recorded import LENGTHS, recipe, row, write_run

RANKS, COMPLETIONS = 16, 512
SLOWER = 0.8


def machine() -> Efficiency:
    """Slower than machines.yaml's in training, faster in decoding."""
    known = efficiency()
    shares = ("bf16_matmul", "fp8_matmul", "attention", "torch_attention", "memory", "nvlink", "network")
    slowed = {name: SLOWER * getattr(known, name) for name in shares}
    slowed["routed_element_ps"] = known.routed_element_ps / SLOWER
    return replace(known, **slowed, rl_decode=1.1, refit_share=0.2, step_overhead_s=9.0)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Measured]:
    """A run as that machine would leave it, by the planner's own formulas; training's seconds vary around the mean."""

    def run(name: str = "run", **sections: Any) -> Measured:
        config = recipe(tmp_path, name, **{"rollout": {"sglang": {"servers": 4}}} | sections)
        empty = measure(write_run(config, RANKS, [row(step, RANKS) for step in (1, 2, 3)]), 2)
        step = expected(empty, find_gpu("h100-sxm"), machine()).step
        bytes_sent = 2 * model_parameters(empty.facts.shape)
        rate = 0.2 * find_gpu("h100-sxm").network
        sampled = step.sampling or 0.0
        generated = sum(LENGTHS) / len(LENGTHS) * COMPLETIONS
        rows = [
            row(
                number,
                RANKS,
                seconds__training=(step.training.total + step.scoring) * wobble,
                seconds__rollout=sampled + 9.0,
                seconds__weights=bytes_sent / rate,
                speed__sampling_tokens_per_second=generated / sampled,
                speed__weights_gb_per_second=rate / 1e9,
            )
            for number, wobble in enumerate((5, 5, 0.99, 1.01, 0.99, 1.01), start=1)
        ]
        (config.path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in rows))
        return measure(config.path, 2)

    return run


def test_the_rates_of_the_machine_are_found_again(make: Callable[..., Measured]) -> None:
    measured = make()
    found = calibrate(measured, efficiency())
    for name, value in vars(machine()).items():
        assert getattr(found.efficiency, name) == pytest.approx(value, rel=1e-3), name
    changed = {change.name for change in found.changes}
    assert {"bf16_matmul", "rl_decode", "refit_share", "step_overhead_s"} <= changed
    assert [text.partition(":")[0] for text in found.kept] == ["checkpoint_node_gb_s"]
    plan = expected(measured, find_gpu("h100-sxm"), found.efficiency)
    assert plan.step.training.total == pytest.approx(measured.seconds["training"])
    assert plan.step.sampling == pytest.approx(measured.sampling_seconds)


def test_the_uncertainty_is_the_runs_for_its_own_layout_alone(make: Callable[..., Measured]) -> None:
    measured = make()
    found = calibrate(measured, efficiency())
    assert found.spread == pytest.approx(2 * (0.01 * (4 / 3) ** 0.5) / 4**0.5)
    plan = expected(measured, find_gpu("h100-sxm"), found.efficiency)
    assert found.uncertainty(plan) == plan.uncertainty | {"training": found.spread}
    assert found.uncertainty(replace(plan, gpus=32)) == plan.uncertainty
    other = plan.parallel.model_copy(update={"tensor": 2})
    assert found.uncertainty(replace(plan, parallel=other)) == plan.uncertainty


def test_what_a_run_does_not_tell_stays(make: Callable[..., Measured]) -> None:
    ahead = {
        "rollout": {"staleness": 1, "sglang": {"servers": 4}},
        "algorithm": {"importance": {"level": "token"}},
    }
    found = calibrate(make("ahead", **ahead), efficiency())
    assert found.efficiency.step_overhead_s == efficiency().step_overhead_s
    assert any(text.startswith("step_overhead_s: sampling ran beside training") for text in found.kept)
    quick = replace(make(), sampling_rate=1e9)
    found = calibrate(quick, efficiency())
    assert found.efficiency.rl_decode == efficiency().rl_decode
    assert any(text.startswith("rl_decode: sampling took") for text in found.kept)


def test_a_run_that_tells_nothing(tmp_path: Path) -> None:
    for name, device, steps, said in (
        ("cpu", "cpu", 4, "ran on cpu, which plan/machines.yaml does not know"),
        ("short", "NVIDIA H200", 3, "has one step behind the warm-up"),
    ):
        config = recipe(tmp_path, name)
        run = write_run(config, 8, [row(step, 8) for step in range(1, steps + 1)], device)
        with pytest.raises(UserError, match=said):
            calibrate(measure(run, 2), efficiency())


def test_the_command_says_what_was_replaced(
    make: Callable[..., Measured], capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(make().run)
    with pytest.raises(SystemExit):
        main(["plan", "--calibrate", run])
    shown = capsys.readouterr().out
    assert "calibrated by" in shown and "rl_decode" in shown and "4 steps on 16 NVIDIA H100" in shown
    assert "training ± 1.2%" in shown
    with pytest.raises(SystemExit):
        main(["plan", f"{run}/config.yaml", "--gpus", "32", "--calibrate", run, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["calibration"]["factors"]["bf16_matmul"]["after"] == pytest.approx(
        SLOWER * efficiency().bf16_matmul, rel=1e-3
    )
    assert found["gpus"] == 32 and found["uncertainty"]["training"] == 0.15
    with pytest.raises(SystemExit) as error:
        main(["plan", "--published", "rows.csv", "--calibrate", run])
    assert error.value.code == 2
    assert "no other option than --json" in capsys.readouterr().err
