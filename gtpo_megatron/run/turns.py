"""Whose the GPUs' memory is, where ranks and servers share them (`rollout.placement: together`): the order of a step.

    sampling -> training -> weights -> sampling

training   servers hold nothing; the trainer has its gradients and the optimizer's state
weights    the trainer has lent those; servers hold room for weights, which they are given
sampling   servers hold all of theirs

At no time do both hold everything: a side gives up first, and the other takes when all ranks know of it. A run begins with
`weights`: the trainer lends before servers start, which then hold all of theirs.
"""

from typing import Literal, Protocol

from gtpo_megatron.policy.collective import for_rank_zero, together

Turn = Literal["sampling", "training", "weights"]
AFTER: dict[Turn, Turn] = {"sampling": "training", "training": "weights", "weights": "sampling"}


class Lender(Protocol):
    """The trainer's side, on every rank; see `policy.lending`."""

    def lend(self) -> None: ...

    def take_back(self) -> None: ...

    def trim(self) -> None: ...


class Occupants(Protocol):
    """The servers' side, on rank 0; see `rollout.sglang.servers.occupation`."""

    def release_memory(self) -> None: ...

    def resume_weights(self) -> None: ...

    def resume_cache(self) -> None: ...


class Turns:
    """The turns of one run, seen from one rank. All methods are collective, and raise on every rank what failed on one."""

    def __init__(self, trainer: Lender) -> None:
        """The trainer lends at once: servers may start when this returns."""
        self.turn: Turn = "weights"
        self._trainer = trainer
        self._servers: Occupants | None = None
        together(trainer.lend)

    def follow(self, servers: Occupants | None) -> None:
        """From now on these servers take turns with the trainer; None on ranks but 0."""
        self._servers = servers

    def take(self, turn: Turn) -> None:
        """Go over to the next turn; nothing where it is this one already.

        Raises:
            RuntimeError: another turn comes next.
        """
        if turn == self.turn:
            return
        if turn != AFTER[self.turn]:
            raise RuntimeError(f"after the turn {self.turn} comes {AFTER[self.turn]}, not {turn}")
        if turn == "training":
            for_rank_zero(lambda: self._servers.release_memory())
            together(self._trainer.take_back)
        elif turn == "weights":
            together(self._trainer.lend)
            for_rank_zero(lambda: self._servers.resume_weights())
        else:
            together(self._trainer.trim)  # buckets of weights, activations of the certificate
            for_rank_zero(lambda: self._servers.resume_cache())
        self.turn = turn
