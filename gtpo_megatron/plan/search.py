"""The layouts of a number of GPUs beside each other, and how trainer and servers share it: which is best, and why the others are not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gtpo_megatron.config import ParallelConfig, RunConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.checks import batch_problems, layout_problems
from gtpo_megatron.plan.estimate import Plan, make_plan, sampled_seconds
from gtpo_megatron.plan.facts import GPU, Efficiency
from gtpo_megatron.plan.layout import HFShape
from gtpo_megatron.plan.memory import GIB

PARTS = 8  # a split is tried in this many steps, of whole nodes where there are as many
FARTHEST = 1 << 14  # GPUs; no recipe is looked at beyond


@dataclass(frozen=True)
class Candidate:
    """A layout of a search, and why it is not the first."""

    plan: Plan
    reason: str


def search(
    config: RunConfig,
    shape: HFShape,
    gpus: int,
    gpu: GPU,
    lengths: Sequence[float],
    reached: Efficiency,
    *,
    serving: int | None = None,
) -> list[Candidate]:
    """Layouts that stand on `gpus` GPUs, best first: those that fit by seconds of training, then those that do not by memory.

    `serving`: GPUs of the servers (`make_plan`).
    """
    sampling = sampled_seconds(config, shape, gpus, gpu, lengths, reached, serving)
    plans = [
        make_plan(changed, shape, gpus, gpu, lengths, reached, sampling=sampling, serving=serving)
        for changed in _layouts(config, shape, gpus, gpu)
    ]
    fitting = sorted((p for p in plans if p.fits), key=lambda p: (p.step.step, p.step.training.total))
    rest = sorted((p for p in plans if not p.fits), key=lambda p: p.worst.total)
    if not fitting:
        return [Candidate(plan, _too_large(plan)) for plan in rest]
    best = fitting[0]
    return [
        *(Candidate(plan, "" if plan is best else _slower(plan, best)) for plan in fitting),
        *(Candidate(plan, _too_large(plan)) for plan in rest),
    ]


def splits(
    config: RunConfig, shape: HFShape, gpus: int, gpu: GPU, lengths: Sequence[float], reached: Efficiency
) -> list[Candidate]:
    """`gpus` GPUs shared between trainer and servers, the best layout of each share; the fastest step first.

    Shares on which nothing fits are left out. Empty where no servers sample, or they share the trainer's GPUs.
    """
    if config.rollout.placement == "together":
        return []
    unit = max(1, gpus // PARTS) if gpus < PARTS * gpu.node else gpus // gpu.node // PARTS * gpu.node
    found: list[Plan] = []
    for trainers in range(unit, gpus, unit):
        try:
            ranked = search(config, shape, trainers, gpu, lengths, reached, serving=gpus - trainers)
        except UserError:  # no server on so few GPUs
            continue
        if ranked and ranked[0].plan.fits and ranked[0].plan.servers:
            found.append(ranked[0].plan)
    found.sort(key=lambda plan: plan.step.step)
    return [Candidate(plan, "" if plan is found[0] else _waits(plan, found[0])) for plan in found]


def smallest_that_fits(
    config: RunConfig, shape: HFShape, gpus: int, gpu: GPU, lengths: Sequence[float], reached: Efficiency
) -> Plan | None:
    """The fastest plan on the fewest GPUs, `gpus` doubled time and again, on which any layout fits; None if none does."""
    while (gpus := 2 * gpus) <= FARTHEST:
        found = search(config, shape, gpus, gpu, lengths, reached)
        if found and found[0].plan.fits:
            return found[0].plan
    return None


def _layouts(config: RunConfig, shape: HFShape, gpus: int, gpu: GPU) -> Iterator[RunConfig]:
    powers = [2**n for n in range(12)]
    chunked = [n for n in range(2, 9) if shape.layers % n == 0]
    for tensor in (n for n in powers if n <= min(gpu.node, gpus)):
        for pipeline in (n for n in range(1, min(shape.layers, gpus) + 1) if shape.layers % n == 0):
            for context in (n for n in powers[:4] if tensor * pipeline * n <= gpus):
                for expert in (n for n in powers if n <= max(1, shape.experts)):
                    for virtual in (None, *(chunked if pipeline > 1 else [])):
                        parallel = ParallelConfig(
                            tensor=tensor,
                            pipeline=pipeline,
                            virtual_pipeline=virtual,
                            context=context,
                            expert=expert,
                            sequence=tensor > 1,
                        )
                        spread = config.model_copy(update={"parallel": parallel})
                        if any(layout_problems(parallel, shape, gpus)) or any(batch_problems(spread, gpus)):
                            continue
                        for recompute in ("none", "selective", "full"):
                            training = config.training.model_copy(update={"recompute": recompute})
                            yield spread.model_copy(update={"training": training})


def _too_large(plan: Plan) -> str:
    worst = plan.worst
    part = max(worst.parts, key=lambda name: worst.parts[name])
    return f"does not fit; most: {part}, {worst.parts[part] / GIB:.1f} GiB"


def _slower(plan: Plan, best: Plan) -> str:
    mine, theirs = plan.step.training, best.step.training
    cause = max(vars(mine), key=lambda name: getattr(mine, name) - getattr(theirs, name))
    more = mine.total - theirs.total
    worse = getattr(mine, cause) - getattr(theirs, cause)
    return f"trains {more:.2f} s slower; {cause} {worse:+.2f} s"


def _waits(plan: Plan, best: Plan) -> str:
    mine, theirs = plan.step, best.step
    causes = {
        "sampling": (mine.sampling or 0.0) - (theirs.sampling or 0.0),
        "training": mine.training.total - theirs.training.total,
        "scoring": mine.scoring - theirs.scoring,
    }
    cause = max(causes, key=lambda name: causes[name])
    return f"{mine.step - theirs.step:+.1f} s; {cause} {causes[cause]:+.1f}"
