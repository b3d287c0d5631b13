"""The order of prompts: seeded epochs, prompts that come back unused, and a state that can be saved and restored exactly."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gtpo_megatron.errors import UserError


class PromptSampler:
    """Walks indices 0..num_prompts-1 in epochs; each epoch is a permutation of its own, fixed by (seed, epoch).

    Args:
        num_prompts: size of the set, at least 1.
        seed: of the permutations.
        shuffle: False walks every epoch in order.
        fingerprint: of the set (`PromptSet.fingerprint`); a state saved with another one is refused.
    """

    def __init__(self, num_prompts: int, seed: int, shuffle: bool, fingerprint: str = "") -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, not {num_prompts}")
        self._num_prompts = num_prompts
        self._fingerprint = fingerprint
        self._seed = seed
        self._shuffle = shuffle
        self._position = 0  # prompts of the epochs handed out so far
        self._returned: list[int] = []  # handed out, and put back
        self._taken = 0  # handed out so far, those that were put back counting again
        self._order_epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, np.int64)

    @property
    def epoch(self) -> int:
        """Epoch of the next prompt, from 0."""
        return self._position // self._num_prompts

    def next(self, n: int) -> list[int]:
        """The next n indices, those put back first; a batch may reach into the next epoch, and so may hold an index twice."""
        indices, self._returned = self._returned[:n], self._returned[n:]
        fresh = n - len(indices)
        for position in range(self._position, self._position + fresh):
            epoch, offset = divmod(position, self._num_prompts)
            indices.append(int(self._epoch_order(epoch)[offset]))
        self._position += fresh
        self._taken += n
        return indices

    def put_back(self, indices: Sequence[int]) -> None:
        """Take back indices that were not used; they are handed out again before all others."""
        self._returned += indices

    def state_dict(self) -> dict[str, Any]:
        """The position and all that fixes the order; JSON-able. `taken` grows with every index handed out."""
        return {
            "num_prompts": self._num_prompts,
            "fingerprint": self._fingerprint,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "position": self._position,
            "returned": list(self._returned),
            "taken": self._taken,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken; its seed and shuffle replace this sampler's.

        Raises:
            UserError: the state belongs to another set.
        """
        mine, theirs = (self._num_prompts, self._fingerprint), (state["num_prompts"], state["fingerprint"])
        if mine != theirs:
            raise UserError(
                f"the saved position belongs to another prompt set: {theirs[0]} prompts (fingerprint '{theirs[1]}'), "
                f"but this run has {mine[0]} (fingerprint '{mine[1]}'). Give the run the same data section, data files "
                "and tokenizer as before, or start a new run"
            )
        self._seed, self._shuffle, self._position = state["seed"], state["shuffle"], state["position"]
        self._returned, self._taken = list(state["returned"]), state["taken"]
        self._order_epoch = -1

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._order_epoch:
            if self._shuffle:
                # Sorting raw bits, and not Generator.permutation: numpy promises only the former stays the same
                # from version to version.
                bits = np.random.PCG64([self._seed, epoch]).random_raw(self._num_prompts)
                self._order = np.argsort(bits, kind="stable")
            else:
                self._order = np.arange(self._num_prompts)
            self._order_epoch = epoch
        return self._order
