"""The planner's rates replaced by what a run measured.

One run tells how long training took, not which of its parts was slow: all that training reaches is scaled by one factor, so
that the plan of that run comes out at what was measured. Decoding, the transfer's share and a step's overhead are found apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.estimate import Plan
from gtpo_megatron.plan.facts import Efficiency
from gtpo_megatron.plan.layout import model_parameters
from gtpo_megatron.scaling.measured import Measured
from gtpo_megatron.scaling.study import expected, trained_seconds

# Of training: shares of a rate, which grow as it gets faster; and picoseconds, which fall
SHARES = ("bf16_matmul", "fp8_matmul", "attention", "torch_attention", "memory", "nvlink", "network")
COSTS = ("routed_element_ps",)


@dataclass(frozen=True)
class Change:
    """A factor that is replaced."""

    name: str
    before: float
    after: float
    measured: str  # what it follows from


@dataclass(frozen=True)
class Calibration:
    """Rates from a run, and how far they can be trusted."""

    measured: Measured
    efficiency: Efficiency
    changes: tuple[Change, ...]
    kept: tuple[str, ...]  # what the run does not tell, and why
    spread: float  # twice the standard error of the mean of training's seconds, over it

    def uncertainty(self, plan: Plan) -> dict[str, float]:
        """Relative errors of a plan with these rates.

        Of the run's own layout on as many GPUs, for training that of its mean; elsewhere, and of the rest, as without
        calibration: what one layout reached says nothing certain of another.
        """
        m = self.measured
        same = (
            plan.gpus == m.ranks
            and plan.parallel == m.config.parallel
            and plan.recompute == m.config.training.recompute
        )
        return plan.uncertainty | ({"training": self.spread} if same else {})

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        m = self.measured
        return {
            "run": str(m.run),
            "gpu": m.facts.device,
            "ranks": m.ranks,
            "steps": m.steps,
            "training_uncertainty": self.spread,
            "factors": {
                c.name: {"before": c.before, "after": c.after, "from": c.measured} for c in self.changes
            },
            "kept": list(self.kept),
        }


def calibrate(measured: Measured, reached: Efficiency) -> Calibration:
    """Replace what a run tells of `reached`.

    Raises:
        UserError: its GPU is not in machines.yaml, or it has fewer than two steps, so that nothing is known of their spread.
    """
    gpu = measured.facts.gpu
    if gpu is None:
        raise UserError(
            f"--calibrate: {measured.run} ran on {measured.facts.device}, which plan/machines.yaml does not know: "
            "nothing in it says how fast a known GPU is"
        )
    if measured.deviation is None:
        raise UserError(
            f"--calibrate: {measured.run} has one step behind the warm-up; give it two or more (training.steps)"
        )
    plan = expected(measured, gpu, reached)
    changes = [*_training(measured, plan, reached)]
    # prompts are computed at the rates of training
    trained = replace(reached, **{change.name: change.after for change in changes})
    kept: list[str] = []
    for found in (
        _decoding(measured, trained),
        _transfer(measured, plan, reached),
        _overhead(measured, reached),
    ):
        (kept if isinstance(found, str) else changes).append(found)
    kept.append("checkpoint_node_gb_s: metrics do not hold the seconds of checkpoints")
    new = replace(reached, **{change.name: change.after for change in changes})
    return Calibration(
        measured, new, tuple(changes), tuple(kept), 2 * measured.deviation / measured.steps**0.5
    )


def _training(measured: Measured, plan: Plan, reached: Efficiency) -> Iterator[Change]:
    seconds = measured.seconds["training"]
    factor = trained_seconds(plan, measured) / seconds
    source = f"training took {seconds:.3g} s, {1 / factor:.3g} times as long as planned"
    for name in SHARES:
        yield Change(name, getattr(reached, name), getattr(reached, name) * factor, source)
    for name in COSTS:
        yield Change(name, getattr(reached, name), getattr(reached, name) / factor, source)


def _decoding(measured: Measured, reached: Efficiency) -> Change | str:
    """A batch's seconds are those of prompts and `rl_decode` times those of decoding steps: solved for it."""
    gpu, seconds = measured.facts.gpu, measured.sampling_seconds
    assert gpu is not None
    one, none = (
        expected(measured, gpu, replace(reached, rl_decode=factor)).step.sampling for factor in (1, 0)
    )
    if seconds is None or one is None or none is None:
        return "rl_decode: the run sampled without servers that are modelled, or read its batches back"
    if seconds <= none:
        return f"rl_decode: sampling took {seconds:.3g} s, less than the {none:.3g} s that prompts alone are planned to take"
    return Change(
        "rl_decode", reached.rl_decode, (seconds - none) / (one - none), f"sampling took {seconds:.3g} s"
    )


def _transfer(measured: Measured, plan: Plan, reached: Efficiency) -> Change | str:
    if measured.transfer_rate is None or plan.step.sampling is None:
        return "refit_share: no weights went to servers that are modelled"
    share = measured.transfer_rate / min(plan.gpu.nvlink, plan.gpu.network)
    return Change(
        "refit_share", reached.refit_share, share, f"weights went at {measured.transfer_rate / 1e9:.3g} GB/s"
    )


def _overhead(measured: Measured, reached: Efficiency) -> Change | str:
    if measured.config.rollout.staleness or measured.sampling_seconds is None:
        return "step_overhead_s: sampling ran beside training, or is not known"
    sent = 0.0
    if measured.transfer_rate:
        bytes_each = 2 if measured.config.model.dtype == "bf16" else 4
        sent = model_parameters(measured.facts.shape) * bytes_each / measured.transfer_rate
    rest = measured.step_seconds - measured.seconds["training"] - measured.sampling_seconds - sent
    return Change(
        "step_overhead_s", reached.step_overhead_s, max(0.0, rest), f"{rest:.3g} s of a step were left"
    )
