"""The mathematics of GTPO (arXiv 2508.03772) and its baselines: pure functions on tensors, on CPU and GPU.

The walk of a step: `group_advantages` -> `conflict_runs` -> `token_weights`; the policy's forward pass gives log-probabilities
and entropies -> `entropy_gate` -> `gtpo_loss`. The loss is additive over micro-batches and ranks.

The default is the paper's formula. `compat="reference"` reproduces the authors' code where it departs from it:
`token_weights(compat="reference")`, `completion_normalizers(compat="reference")` as `num_completions`,
`entropy_gate(mode="always", threshold=REFERENCE_THRESHOLD)`, `gamma=REFERENCE_GAMMA`, and entropies computed by the policy as
-sum p ln max(p, REFERENCE_ENTROPY_FLOOR).
"""

from gtpo_megatron.algorithm.advantages import group_advantages
from gtpo_megatron.algorithm.baselines import (
    GrpoDiagnostics,
    ImportanceWeights,
    grpo_loss,
    importance_weights,
    sft_loss,
)
from gtpo_megatron.algorithm.conflicts import conflict_runs
from gtpo_megatron.algorithm.losses import (
    REFERENCE_ENTROPY_FLOOR,
    REFERENCE_GAMMA,
    REFERENCE_THRESHOLD,
    completion_normalizers,
    gtpo_loss,
)
from gtpo_megatron.algorithm.weights import entropy_gate, token_weights

__all__ = [
    "REFERENCE_ENTROPY_FLOOR",
    "REFERENCE_GAMMA",
    "REFERENCE_THRESHOLD",
    "GrpoDiagnostics",
    "ImportanceWeights",
    "completion_normalizers",
    "conflict_runs",
    "entropy_gate",
    "group_advantages",
    "grpo_loss",
    "gtpo_loss",
    "importance_weights",
    "sft_loss",
    "token_weights",
]
