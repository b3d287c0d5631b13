"""What a run measured of its steps, as means behind a warm-up."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from gtpo_megatron.config import RunConfig
from gtpo_megatron.config.loading import load_config
from gtpo_megatron.errors import UserError
from gtpo_megatron.run.facts import RunFacts, read_facts
from gtpo_megatron.run.metrics import METRICS, Metric, read_metrics

_SECONDS = "seconds/"
_NEEDED = (
    "tokens",
    "model_flop",
    "world_size",
    "memory/peak_gib",
)  # of each step, since the version that has run.json


@dataclass(frozen=True)
class Measured:
    """A run's steps: means of a step, where nothing else is said."""

    run: Path
    config: RunConfig
    facts: RunFacts
    steps: int  # that count
    dropped: int  # of the warm-up, and those that were traced
    seconds: dict[str, float]  # by stage
    deviation: (
        float | None
    )  # of a step's training seconds from one to the next, over their mean; None of one step
    tokens: float  # prompts included
    flop: float
    generated: float | None  # tokens; None of SFT
    sampling_rate: float | None  # generated tokens/s of the servers
    transfer_rate: float | None  # bytes/s of weights to them
    memory: dict[str, float]  # GiB by part, of the rank with most, in the last step

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def ranks(self) -> int:
        return self.facts.world_size

    @property
    def completions(self) -> int:
        """Sequences of a step."""
        if self.config.algorithm.name == "sft":
            return self.config.training.sft_batch_size
        return self.config.rollout.prompts_per_step * self.config.rollout.group_size

    @property
    def tokens_per_rank(self) -> float:
        """Tokens/s of a rank over the whole step."""
        return self.tokens / self.step_seconds / self.ranks

    @property
    def trained_per_rank(self) -> float:
        """The same while training."""
        return self.tokens / self.seconds["training"] / self.ranks

    @property
    def mfu_training(self) -> float | None:
        """Of the GPUs' dense BF16 rate; None where the GPU is not known."""
        gpu = self.facts.gpu
        return gpu and self.flop / self.seconds["training"] / self.ranks / gpu.bf16

    @property
    def sampling_seconds(self) -> float | None:
        """From a batch's first request to its last score."""
        if self.generated is None or self.sampling_rate is None:
            return None
        return self.generated / self.sampling_rate


def measure(run: Path, warmup: int) -> Measured:
    """Read a run; its first `warmup` steps, and those that were traced, do not count.

    Raises:
        UserError: it is no run, has no step left, or was trained by different numbers of ranks.
    """
    facts, config = read_facts(run), load_config(run / "config.yaml")
    file = run / METRICS
    rows = [row for row in read_metrics(file) if f"{_SECONDS}training" in row]
    kept = [row for row in rows[warmup:] if row["step"] not in config.training.profile.steps]
    if not kept:
        traced = ", or were traced" if config.training.profile.steps else ""
        raise UserError(
            f"{file}: {len(rows)} steps of training, all of which are of the warm-up ({warmup} steps){traced}; "
            "give it more steps (training.steps), or lower --warmup"
        )
    for row in kept:
        if lacking := [name for name in _NEEDED if not isinstance(row.get(name), int | float)]:
            raise UserError(
                f"{file}: step {row['step']} has no {lacking[0]}; it was trained by an older version: train again"
            )
    if len(sizes := sorted({int(row["world_size"]) for row in kept} | {facts.world_size})) > 1:
        raise UserError(
            f"{file}: steps of {' and '.join(map(str, sizes))} ranks; a report needs runs of one number each"
        )
    return _means(run, config, facts, kept, len(rows) - len(kept))


def _means(
    run: Path, config: RunConfig, facts: RunFacts, rows: Sequence[dict[str, Metric]], dropped: int
) -> Measured:
    stages = sorted({name for row in rows for name in row if name.startswith(_SECONDS)})
    training = _values(rows, f"{_SECONDS}training")
    lengths = _values(rows, "response/length_mean")
    completions = config.rollout.prompts_per_step * config.rollout.group_size
    transfer = _mean(rows, "speed/weights_gb_per_second")
    parts = ("weights", "gradients", "optimizer", "peak")
    return Measured(
        run=run,
        config=config,
        facts=facts,
        steps=len(rows),
        dropped=dropped,
        seconds={name.removeprefix(_SECONDS): sum(_values(rows, name)) / len(rows) for name in stages},
        deviation=stdev(training) / mean(training) if len(training) > 1 else None,
        tokens=mean(_values(rows, "tokens")),
        flop=mean(_values(rows, "model_flop")),
        generated=mean(lengths) * completions if lengths else None,
        sampling_rate=_mean(rows, "speed/sampling_tokens_per_second"),
        transfer_rate=transfer and transfer * 1e9,
        memory={part: float(rows[-1].get(f"memory/{part}_gib") or 0.0) for part in parts},
    )


def _values(rows: Sequence[dict[str, Metric]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if isinstance(row.get(name), int | float)]


def _mean(rows: Sequence[dict[str, Metric]], name: str) -> float | None:
    values = _values(rows, name)
    return mean(values) if values else None
