"""Early warning of a collapse: a pure function over the metrics of a run's steps, and what a run does about it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gtpo_megatron.config import AlarmConfig
from gtpo_megatron.errors import UserError

LEAST_WINDOW = 3  # steps after the baseline before anything is said
GAP_FLOOR = 0.02  # nats: gaps below are rounding, whatever they were at the start
History = Sequence[Mapping[str, Any]]  # metrics of training steps, oldest first


@dataclass(frozen=True)
class Alarm:
    """A rule that fires."""

    rule: str
    text: str  # what is seen, with its figures


@dataclass(frozen=True)
class _View:
    """A metric at the start, now, and at its best in between: means of windows."""

    start: float
    now: float
    best: float

    @property
    def times(self) -> float:
        """How many times the start's value it is now; infinite where that was 0 and this is not."""
        return self.now / self.start if self.start else (math.inf if self.now else 1.0)


def alarms(history: History, config: AlarmConfig) -> list[Alarm]:
    """The rules that fire after the last step of a history; none while it is too short to say.

    Each rule holds the mean of the newest `window` steps against the mean of the first `baseline`. A metric that a step
    lacks (NaN was written as null) is left out of the means; a rule whose metric the run has not, does not fire.

    Args:
        history: metrics of training steps from the run's first, oldest first.
        config: thresholds.
    """
    if config.action == "off" or len(history) < config.baseline + LEAST_WINDOW:
        return []
    found = [rule(history, config) for rule in _RULES]
    return [alarm for alarm in found if alarm is not None]


def _view(history: History, name: str, config: AlarmConfig) -> _View | None:
    values = np.array(
        [np.nan if isinstance(v := row.get(name), bool | str | None) else v for row in history], np.float64
    )
    first, rest = values[: config.baseline], values[config.baseline :]
    now = rest[-config.window :]
    if np.isnan(first).all() or np.isnan(now).all():
        return None
    windows = np.lib.stride_tricks.sliding_window_view(values, min(config.window, len(values)))
    known = windows[~np.isnan(windows).any(axis=1)]
    start = float(np.nanmean(first))
    best = float(known.mean(axis=1).max()) if len(known) else start
    return _View(start, float(np.nanmean(now)), best)


def _entropy(history: History, config: AlarmConfig) -> Alarm | None:
    entropy = _view(history, "entropy/mean", config)
    if entropy is None:
        return None
    ln2 = math.log(2)
    side = "above ln 2" if entropy.now > ln2 else "below ln 2"
    text = (
        f"entropy {entropy.now:.3g} nats ({side}), {entropy.times:.2g} times the start's {entropy.start:.3g}"
    )
    if config.entropy_rise and entropy.start <= ln2 < entropy.now:
        return Alarm("entropy", f"{text}: it rose over ln 2")
    rises = config.entropy_rise and entropy.times > config.entropy_rise
    return Alarm("entropy", text) if rises or entropy.times < config.entropy_fall else None


def _length(history: History, config: AlarmConfig) -> Alarm | None:
    length = _view(history, "response/length_mean", config)
    if length is None or not config.length_change:
        return None
    if 1 / config.length_change <= length.times <= config.length_change:
        return None
    return Alarm("length", f"mean length {length.now:.4g} tokens, {length.start:.4g} at the start")


def _truncated(history: History, config: AlarmConfig) -> Alarm | None:
    return _share_rises(
        history, config, "truncated", "response/truncated", "truncated completions", config.truncated_rise
    )


def _repetition(history: History, config: AlarmConfig) -> Alarm | None:
    return _share_rises(
        history,
        config,
        "repetition",
        "response/repetition",
        "repeated runs of 4 tokens",
        config.repetition_rise,
    )


def _share_rises(
    history: History, config: AlarmConfig, rule: str, metric: str, what: str, most: float
) -> Alarm | None:
    share = _view(history, metric, config)
    if share is None or not most or share.now - share.start <= most:
        return None
    return Alarm(rule, f"{what}: {share.now:.0%}, {share.start:.0%} at the start")


def _format(history: History, config: AlarmConfig) -> Alarm | None:
    terms = sorted(
        {name for row in history for name in row if name.startswith("reward/") and "format" in name}
    )
    for name in terms:
        term = _view(history, name, config)
        if term is not None and term.best > 0 and term.now < config.format_fall * term.best:
            return Alarm("format", f"{name} {term.now:.3g}, {term.best:.3g} at its best")
    return None


def _grad_norm(history: History, config: AlarmConfig) -> Alarm | None:
    norm = _view(history, "grad_norm", config)
    if norm is None or not config.grad_norm_rise or norm.times <= config.grad_norm_rise:
        return None
    return Alarm("grad_norm", f"gradient norm {norm.now:.3g}, {norm.start:.3g} at the start")


def _no_signal(history: History, config: AlarmConfig) -> Alarm | None:
    silent, reward = (_view(history, name, config) for name in ("groups/no_signal", "reward/mean"))
    if silent is None or reward is None or not config.no_signal or silent.now < config.no_signal:
        return None
    if reward.now > reward.start:  # the task may be solved
        return None
    return Alarm(
        "no_signal",
        f"groups without signal: {silent.now:.0%}, and the reward {reward.now:.3g} is no higher than {reward.start:.3g} at the start",
    )


def _logprob_gap(history: History, config: AlarmConfig) -> Alarm | None:
    gap = _view(history, "logprob_gap/mean", config)
    if gap is None or not config.logprob_gap_rise:
        return None
    if gap.now <= GAP_FLOOR or gap.times <= config.logprob_gap_rise:
        return None
    return Alarm(
        "logprob_gap", f"|trainer - sampler| log-probability {gap.now:.3g}, {gap.start:.3g} at the start"
    )


_RULES: tuple[Callable[[History, AlarmConfig], Alarm | None], ...] = (
    _entropy,
    _length,
    _truncated,
    _repetition,
    _format,
    _grad_norm,
    _no_signal,
    _logprob_gap,
)
RULES = ("entropy", "length", "truncated", "repetition", "format", "grad_norm", "no_signal", "logprob_gap")


class AlarmWatch:
    """Follows a run on one rank: the rules after each step, those that are new, and whether it is time to stop.

    Args:
        config: thresholds, and what to do.
        rows: metrics of the run so far, of a resumed one; lines without a training step are left out.
    """

    def __init__(self, config: AlarmConfig, rows: History = ()) -> None:
        self._config = config
        self._history = [row for row in rows if "loss" in row]
        self._firing: dict[str, int] = {}  # rule -> steps in a row

    def step(self, metrics: Mapping[str, Any]) -> tuple[dict[str, Any], list[Alarm]]:
        """Take in a step; its `alarm/...` metrics, and the alarms that the step before did not have."""
        if self._config.action == "off":
            return {}, []
        self._history.append(metrics)
        found = alarms(self._history, self._config)
        new = [alarm for alarm in found if alarm.rule not in self._firing]
        self._firing = {alarm.rule: 1 + self._firing.get(alarm.rule, 0) for alarm in found}
        names = ", ".join(alarm.rule for alarm in found)
        return {"alarm/firing": len(found), "alarm/rules": names}, new

    def check(self, step: int) -> None:
        """Raises UserError if the run is to stop because of a rule that goes on firing."""
        lasting = [rule for rule, steps in self._firing.items() if steps >= self._config.patience]
        if self._config.action == "stop" and lasting:
            raise UserError(
                f"step {step}: stopped by the alarm ({', '.join(lasting)} for {self._config.patience} steps or more; "
                "alarm.action: stop). What is done is saved; the same command with alarm.action=warn goes on"
            )
