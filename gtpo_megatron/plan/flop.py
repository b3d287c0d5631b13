"""Model FLOP, for plans and for the metrics of runs alike.

Counted as Megatron-Bridge counts: 6 a parameter and token (embedding left out, the head for every token), causal attention
halved, nothing for what recomputation repeats. Its own counter (`flop_utils`) takes every row as one sequence in the older of
the pinned versions, and so charges a packed row for attention between its sequences; tests/policy/test_flop.py holds this
count against it where both can count.
"""

from collections.abc import Iterable
from typing import Literal

from gtpo_megatron.config import AlgorithmConfig
from gtpo_megatron.plan.facts import Model

Pass = Literal["training", "frozen", "forward"]
# Operations of (matrix products with weights, attention) as shares of a forward and backward pass. `frozen`: without the
# gradients of weights, which LoRA does not train; its adapters count as nothing
SHARES: dict[Pass, tuple[float, float]] = {
    "training": (1.0, 1.0),
    "frozen": (2 / 3, 1.0),
    "forward": (1 / 3, 1 / 3),
}


def model_flop(model: Model, context: float, kind: Pass = "training") -> float:
    """Model FLOP of a pass for a token, in sequences of that length."""
    weights = model.dense_parameters + model.active_expert_parameters + model.head_parameters
    products, scores = SHARES[kind]
    return 6 * weights * products + attention_flop(model, context) * scores


def attention_flop(model: Model, context: float) -> float:
    """The attention's part of it, forward and backward."""
    return 6 * model.layers * (model.query_width + model.value_width) * model.visible(context)


def batch_flop(model: Model, lengths: Iterable[int], kind: Pass = "training") -> float:
    """Model FLOP of a pass over sequences of those lengths, however they are packed."""
    return sum(length * model_flop(model, length, kind) for length in lengths)


def scoring_passes(algorithm: AlgorithmConfig) -> int:
    """Forward passes over a step's batch beside those of training: for the ratio's denominator, and for the reference policy."""
    old = algorithm.name != "sft" and algorithm.old_logprobs == "trainer" and algorithm.updates_per_batch > 1
    return int(old) + int(algorithm.kl_beta > 0)
