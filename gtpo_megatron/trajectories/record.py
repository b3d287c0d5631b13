"""The trajectory: the one record that sampling, scoring, training, storage and analysis speak of."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "abort", "data"]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One completion of one prompt, from sampling to its part in the loss.

    Tokens are the policy's own: prompt tokens, padding and tool output never stand in `token_ids`; the end-of-turn token
    does where it was generated. Fields that a later stage fills (reward, advantage, runs) hold their defaults until then.
    """

    step: int  # training step (batch number) that it was sampled for
    group: int  # index of its prompt in the batch
    index: int  # index in its group
    prompt_id: str  # row id in the data set
    prompt_ids: NDArray[np.int32]  # [P]
    token_ids: NDArray[np.int32]  # [L]
    logprobs: NDArray[np.float32]  # [L], of the sampler, natural log, at the sampling temperature
    token_versions: NDArray[np.int32]  # [L], weight version that sampled each token
    finish_reason: FinishReason
    text: str = ""
    answer: str = ""  # the data set's reference answer
    reward: float = 0.0
    reward_terms: dict[str, float] = field(default_factory=dict)  # unweighted
    reward_error: str | None = None
    advantage: float = 0.0
    prefix: int = 0  # conflict run from the start, tokens
    suffix: int = 0  # conflict run from the end, tokens
    seconds: float = 0.0  # from request to completion

    @property
    def length(self) -> int:
        """Number of generated tokens."""
        return len(self.token_ids)
