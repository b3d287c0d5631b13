"""What the training loop asks of a rollout engine. SGLang and the embedded engine both speak this."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from gtpo_megatron.trajectories.record import FinishReason

NamedTensor = tuple[str, torch.Tensor]


@dataclass(frozen=True)
class SamplingParams:
    """How each completion is sampled."""

    n: int  # completions per prompt
    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class PromptRequest:
    """One prompt; its n completions form a group."""

    group: int  # position in the batch; identifies the group in the answers
    prompt_ids: tuple[int, ...]
    seed: int  # fixes the group's samples where the engine can (the embedded one)


@dataclass(frozen=True, eq=False)
class Completion:
    """One sampled continuation."""

    token_ids: NDArray[np.int32]  # [L], the end-of-turn token included if it was generated
    logprobs: NDArray[np.float32]  # [L], of the tempered full distribution
    token_versions: NDArray[np.int32]  # [L], weight version of each token
    finish_reason: FinishReason
    seconds: float


@dataclass(frozen=True, eq=False)
class Group:
    """The n completions of one request."""

    request: PromptRequest
    completions: tuple[Completion, ...]


class RolloutEngine(Protocol):
    """Samples completions with weights that it is given.

    `on_every_rank` says who calls it: with True every rank holds an engine and gives it a share of the prompts; with
    False only rank 0 does. `update_weights` is fed on the ranks that call it. `updates_in_flight` says whether
    `update_weights` may come while a `generate` is under way, whose completions then go on with the new weights.
    """

    on_every_rank: bool
    updates_in_flight: bool
    version: int  # version of the weights it samples with

    def wait_started(self) -> None:
        """Wait until it can take weights, at the first call, or until `abort_all` ends it for good.

        Raises UserError where it will not.
        """
        ...

    def update_weights(self, weights: Iterable[NamedTensor], version: int) -> None:
        """Replace all weights (Hugging Face names, whole tensors). Returns when sampling goes on with `version`, and nothing else."""
        ...

    def generate(self, requests: Sequence[PromptRequest], params: SamplingParams) -> Iterator[Group]:
        """Yield each group as it is finished, in any order; every request is answered exactly once.

        The caller may close the iterator early. An engine may keep what it has of the groups that were not finished, for
        a later request of the same prompt.
        """
        ...

    def abort_all(self, *, for_good: bool = False) -> None:
        """End every `generate` under way at once, from any thread: its iterator stops after the finished groups.

        With `for_good` every later one as well, so that none slips through that is just about to begin, and the wait for
        its start.
        """
        ...

    def waits_for(self) -> str:
        """What it has to wait for beside sampling itself, for people; "" for nothing. From any thread."""
        ...

    def close(self) -> None:
        """End servers and free resources. May be called twice."""
        ...
