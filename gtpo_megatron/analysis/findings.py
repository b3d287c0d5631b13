"""A dump in figures: what GTPO would do with it, and how healthy its completions are."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gtpo_megatron.algorithm import entropy_gate
from gtpo_megatron.analysis.conflict import Examined
from gtpo_megatron.analysis.dump import Dump
from gtpo_megatron.analysis.tokens import Vocabulary
from gtpo_megatron.trajectories.analysis import repetition

TOP_STRINGS = 20
POSITIONS = 32  # counted from each end
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
Figures = dict[str, Any]


@dataclass
class Findings:
    """Figures of all steps, added one after another; `figures` may be asked at any time."""

    dump: Dump
    steps: list[Figures] = field(default_factory=list)
    _protected: Counter[int] = field(default_factory=Counter)  # token id -> how often
    _amplified: Counter[int] = field(default_factory=Counter)
    _columns: dict[str, list[NDArray]] = field(default_factory=dict)  # per completion
    _terms: dict[str, list[NDArray]] = field(default_factory=dict)
    _initial_entropy: float | None = None

    def add(self, examined: Examined) -> Figures:
        """Count completions, and return the figures of their step."""
        batch = examined.batch
        sign = np.repeat(np.sign(examined.advantages), examined.lengths)
        for counter, side in ((self._protected, sign < 0), (self._amplified, sign > 0)):
            ids, counts = np.unique(batch.token_ids[examined.in_conflict & side], return_counts=True)
            counter.update(dict(zip(ids.tolist(), counts.tolist(), strict=True)))
        columns = _per_completion(examined)
        count = sum(map(len, self._columns.get("length", ())))
        for name, values in columns.items():
            self._columns.setdefault(name, []).append(values)
        for name in self._terms.keys() | batch.terms.keys():
            missing = np.full(len(batch), np.nan)
            earlier = [np.full(count, np.nan)] if name not in self._terms and count else []
            self._terms.setdefault(name, earlier).append(batch.terms.get(name, missing))
        step = _step_figures(examined, columns) | self._entropy(columns, batch.step)
        logged = self.dump.step_metrics.get(batch.step, {})
        step["metrics"] = {name: logged.get(name) for name in _LOGGED} if logged else None
        self.steps.append(step)
        return step

    def _entropy(self, columns: Mapping[str, NDArray], step: int) -> Figures:
        """Mean entropy and share of completions that the filter lets pass: from tokens, or from what the run logged."""
        if "entropy" not in columns:
            logged = self.dump.step_metrics.get(step, {})
            return {"entropy": logged.get("entropy/mean"), "gate_pass": logged.get("gate/pass_rate")}
        mean = float(columns["entropy"].mean())
        if "gate" in columns:
            return {"entropy": mean, "gate_pass": float(columns["gate"].mean())}
        if self._initial_entropy is None:
            self._initial_entropy = mean
        gate = entropy_gate(torch.from_numpy(columns["entropy"]), self._initial_entropy)
        return {"entropy": mean, "gate_pass": float(gate.mean())}

    def figures(self, vocabulary: Vocabulary) -> Figures:
        """Everything, as `--json` prints it; null where the dump does not say, and for what is not finite."""
        return _plain(self._figures(vocabulary))

    def _figures(self, vocabulary: Vocabulary) -> Figures:
        columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        total = {name: sum(step[name] for step in self.steps) for name in _COUNTS}
        advantages = columns.get("advantage", np.zeros(0))
        tokens = max(total["tokens"], 1)
        return {
            "format": self.dump.format,
            "files": len(self.dump.paths),
            "steps": len({step["step"] for step in self.steps}),
            **total,
            "lacks": [*self.dump.lacks, *(() if vocabulary.known else (_NO_TOKENIZER,))],
            "conflict": {
                "protected_share": total["protected_tokens"] / tokens,
                "amplified_share": total["amplified_tokens"] / tokens,
                "prefix_mean": _mean(columns.get("prefix")),
                "suffix_mean": _mean(columns.get("suffix")),
                "completions_with_conflict": int(
                    np.count_nonzero(columns.get("prefix", 0) + columns.get("suffix", 0))
                ),
                "from_start": _positions(columns.get("prefix")),
                "from_end": _positions(columns.get("suffix")),
                "strings": self._strings(vocabulary),
            },
            "grpo_gradient": _shares(columns),
            "advantage": {
                "positive": _mean(advantages > 0),
                "negative": _mean(advantages < 0),
                "zero": _mean(advantages == 0),
                "quantiles": _quantiles(advantages),
            },
            "reward": {"mean": _mean(columns.get("reward")), "quantiles": _quantiles(columns.get("reward"))},
            "reward_terms": self._reward_terms(),
            "length": {"mean": _mean(columns["length"]), "quantiles": _quantiles(columns["length"])},
            "truncated": _mean(columns.get("truncated")),
            "repetition": _weighted(self.steps, "repetition", "tokens"),
            "diversity": _weighted(self.steps, "diversity", "groups"),
            "staleness": {
                "mean": _mean(columns.get("staleness")),
                "max": float(columns["staleness"].max()) if "staleness" in columns else None,
            },
            "entropy": self._entropy_figures(),
            "by_step": self.steps,
        }

    def _strings(self, vocabulary: Vocabulary) -> list[Figures]:
        both = self._protected + self._amplified
        return [
            {
                "token": token,
                "text": vocabulary.string(token),
                "protected": self._protected[token],
                "amplified": self._amplified[token],
            }
            for token, _ in both.most_common(TOP_STRINGS)
        ]

    def _reward_terms(self) -> Figures | None:
        if not self._terms:
            return None
        names = sorted(self._terms)
        table = np.stack([np.concatenate(self._terms[name]) for name in names])
        return {
            "names": names,
            "means": [_mean(row[~np.isnan(row)]) for row in table],
            "correlation": [[_correlation(a, b) for b in table] for a in table],
        }

    def _entropy_figures(self) -> Figures:
        known = [step["entropy"] for step in self.steps if step["entropy"] is not None]
        initial = self._initial_entropy if self._initial_entropy is not None else self.dump.initial_entropy
        return {
            "initial": initial,
            "first": known[0] if known else None,
            "last": known[-1] if known else None,
            "threshold": math.log(2),
            "filter_active": None if initial is None else initial <= math.log(2),
        }


_NO_TOKENIZER = "a tokenizer: tokens are shown by their numbers; --tokenizer DIR gives them text"
_LOGGED = ("loss", "grad_norm", "logprob_gap/max")  # of a run of ours
_COUNTS = ("completions", "groups", "tokens", "protected_tokens", "amplified_tokens", "groups_without_signal")


def _per_completion(examined: Examined) -> dict[str, NDArray]:
    """Columns of [N]; those that the dump does not give are left out."""
    batch = examined.batch
    conflict, lengths = examined.conflict_tokens, examined.lengths
    coefficient = np.abs(examined.scaled)
    columns: dict[str, NDArray] = {
        "length": lengths,
        "advantage": examined.advantages,
        "prefix": examined.prefix,
        "suffix": examined.suffix,
        "coefficient": np.where(lengths > 0, coefficient, 0.0),
        "coefficient_in_conflict": coefficient * conflict / np.maximum(lengths, 1),
    }
    if batch.logprobs is not None:
        # |p - onehot| at the sampled token is 1 - p: what the token's own logit gets of the coefficient.
        pull = -np.expm1(np.minimum(batch.logprobs.astype(np.float64), 0.0))
        columns["pull"] = coefficient * _sums(pull, batch.offsets) / np.maximum(lengths, 1)
        pull[~examined.in_conflict] = 0.0
        columns["pull_in_conflict"] = coefficient * _sums(pull, batch.offsets) / np.maximum(lengths, 1)
    if batch.mean_entropies is not None:
        columns["entropy"] = batch.mean_entropies
    elif batch.entropies is not None:
        columns["entropy"] = _sums(batch.entropies.astype(np.float64), batch.offsets) / np.maximum(lengths, 1)
    for name, values in (
        ("reward", batch.rewards),
        ("truncated", batch.truncated),
        ("staleness", batch.staleness),
        ("gate", batch.gates),
    ):
        if values is not None:
            columns[name] = values
    return columns


def _step_figures(examined: Examined, columns: Mapping[str, NDArray]) -> Figures:
    conflict, advantages = examined.conflict_tokens, examined.advantages
    _, group = np.unique(examined.batch.groups, return_inverse=True)
    signal = np.bincount(group, weights=np.abs(advantages))
    return {
        "step": examined.batch.step,
        "completions": len(examined.batch),
        "groups": len(signal),
        "tokens": int(examined.lengths.sum()),
        "protected_tokens": int(conflict[advantages < 0].sum()),
        "amplified_tokens": int(conflict[advantages > 0].sum()),
        "groups_without_signal": int(np.count_nonzero(signal == 0)),
        "reward": _mean(columns.get("reward")),
        "length": _mean(examined.lengths),
        "truncated": _mean(columns.get("truncated")),
        "staleness": _mean(columns.get("staleness")),
        "repetition": repetition(examined.batch.token_ids, examined.batch.offsets),
        "diversity": diversity(examined.batch.token_ids, examined.batch.offsets, group),
    }


def diversity(token_ids: NDArray[np.int32], offsets: NDArray[np.int64], group: NDArray[np.int64]) -> float:
    """Different completions of a group over all of them, mean of the groups; 1 where all differ."""
    different: dict[int, set[bytes]] = {}
    for number, start, end in zip(group.tolist(), offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        different.setdefault(number, set()).add(token_ids[start:end].tobytes())
    sizes = np.bincount(group)
    return float(np.mean([len(found) / sizes[number] for number, found in different.items()]))


def _shares(columns: Mapping[str, NDArray]) -> Figures:
    """Share of GRPO's gradient on conflict tokens: by coefficients |A| / L, and with what the sampled logits get of them."""

    def share(part: str, whole: str) -> float | None:
        total = float(columns[whole].sum()) if whole in columns else 0.0
        return float(columns[part].sum()) / total if total else None

    return {
        "coefficient_share": share("coefficient_in_conflict", "coefficient"),
        "logit_share": share("pull_in_conflict", "pull"),
    }


def _sums(values: NDArray[np.float64], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.diff(np.concatenate([[0.0], np.cumsum(values)])[offsets])


def _plain(value: Any) -> Any:
    """The same without NaN and infinities, which JSON has no spelling for."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean(values: NDArray | None) -> float | None:
    return float(np.mean(values)) if values is not None and len(values) else None


def _quantiles(values: NDArray | None) -> dict[str, float] | None:
    if values is None or not len(values):
        return None
    return {
        f"{q:g}": float(value) for q, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)
    }


def _positions(runs: NDArray[np.int64] | None) -> list[int]:
    """Completions whose run covers each of the first positions."""
    return [] if runs is None else [int(np.count_nonzero(runs > t)) for t in range(POSITIONS)]


def _weighted(steps: list[Figures], name: str, weight: str) -> float | None:
    total = sum(step[weight] for step in steps)
    return sum(step[name] * step[weight] for step in steps) / total if total else None


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Pearson's, where both are known; None if one of them does not vary."""
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = a[known], b[known]
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])
