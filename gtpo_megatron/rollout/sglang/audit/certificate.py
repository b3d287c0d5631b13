"""The mismatch certificate: do servers and trainer give the same tokens the same probability?

Fixed sequences are scored by both. The servers' kernels are not the trainer's, so a small difference is in the nature
of things; a larger one means that the gradient is not of the policy that sampled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gtpo_megatron.config import Fp8Config
from gtpo_megatron.errors import UserError

# Mean |difference| in nats per token above which something is wrong rather than rounded. fp32: two orders above what
# equal weights show (1e-6 to 1e-5), far below one step's change of the weights. bf16: healthy pairs show 0.005 to
# 0.02, growing with depth. FP8 on either side adds its own quantisation: 0.16, 0.17 and 0.23 were measured for its recipes
# beside bf16 on a small model (docs/results/fp8-emulated.md), of which about twice is allowed, as bf16 has it.
DEFAULT_BOUNDS = {"fp32": 1e-4, "bf16": 5e-2, "tensorwise": 0.3, "blockwise": 0.35, "delayed": 0.45}


@dataclass(frozen=True)
class Mismatch:
    """Distribution of server minus trainer logprobs, nats, over all tokens of all sequences."""

    tokens: int
    mean_abs: float
    p99_abs: float
    max_abs: float
    mean: float  # signed: a bias is worse than noise
    kl: float  # k3 estimate of KL(server || trainer), nats per token; exact only for sequences that the server sampled

    def metrics(self, prefix: str = "mismatch") -> dict[str, float]:
        """Names and values for the metrics file."""
        return {f"{prefix}/{name}": float(value) for name, value in asdict(self).items()}


def default_bound(dtype: Literal["bf16", "fp32"], fp8: Fp8Config) -> float:
    """The bound on the mean |difference| where the configuration sets none."""
    return DEFAULT_BOUNDS[fp8.recipe if fp8.enabled else dtype]


def mismatch(server: Sequence[NDArray[np.float32]], trainer: Sequence[NDArray[np.float32]]) -> Mismatch:
    """Compare the logprobs ([L] each) of the same sequences.

    Raises:
        ValueError: other lengths, or no token at all.
    """
    if [len(s) for s in server] != [len(t) for t in trainer] or not sum(map(len, server)):
        raise ValueError("server and trainer must have scored the same, non-empty sequences")
    delta = np.concatenate(server).astype(np.float64) - np.concatenate(trainer).astype(np.float64)
    return Mismatch(
        tokens=len(delta),
        mean_abs=float(np.abs(delta).mean()),
        p99_abs=float(np.quantile(np.abs(delta), 0.99)),
        max_abs=float(np.abs(delta).max()),
        mean=float(delta.mean()),
        kl=float((np.exp(-delta) - 1 + delta).mean()),
    )


def certify(
    scores: Mapping[str, Sequence[NDArray[np.float32]]], trainer: Sequence[NDArray[np.float32]], bound: float
) -> dict[str, Mismatch]:
    """The mismatch of every server, by URL, from `SGLangEngine.score` and the trainer's logprobs of the same sequences.

    Raises:
        UserError: a server's mean |difference| is above `bound`, or not a number.
    """
    found = {url: mismatch(server, trainer) for url, server in scores.items()}
    bad = {url: m for url, m in found.items() if not m.mean_abs <= bound}
    if bad:
        lines = [
            f"  {url}: mean |difference| {m.mean_abs:.3g}, 99% below {m.p99_abs:.3g}, largest {m.max_abs:.3g}, "
            f"mean {m.mean:+.3g}, over {m.tokens} tokens"
            for url, m in bad.items()
        ]
        raise UserError(
            f"servers and trainer disagree on logprobs: more than {bound:g} nats per token "
            "(rollout.sglang.max_logprob_gap; by default it follows the dtype):\n"
            + "\n".join(lines)
            + "\nIf SGLangEngine.verify_weights names no tensor, the weights are the same and the arithmetic differs."
        )
    return found
