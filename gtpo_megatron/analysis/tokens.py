"""Between texts and token ids: what a dump lacks of either, a tokenizer gives."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from gtpo_megatron.analysis.dump import Completions, flat
from gtpo_megatron.errors import UserError


class Vocabulary:
    """A tokenizer from a local folder, or none: then tokens are shown by their numbers, and texts alone cannot be analysed."""

    def __init__(self, tokenizer: Any = None) -> None:
        self._tokenizer = tokenizer
        self._strings: dict[int, str] = {}

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """The tokenizer of a Hugging Face folder.

        Raises:
            UserError: there is none.
        """
        from transformers import AutoTokenizer

        if not Path(folder).is_dir():
            raise UserError(f"--tokenizer {folder}: no such directory; give a model's or tokenizer's folder")
        try:
            return cls(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
        except Exception as error:  # transformers raises what it likes for a folder without a tokenizer
            raise UserError(
                f"--tokenizer {folder}: no tokenizer there: {str(error).splitlines()[0]}"
            ) from error

    @property
    def known(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    def complete(self, batch: Completions, format_name: str) -> Completions:
        """The completions with token ids, made from their texts if the dump has none.

        Raises:
            UserError: there are texts alone and no tokenizer, or an id is outside its vocabulary.
        """
        if batch.token_ids is not None:
            self._check(batch)
            return batch
        if not self.known:
            raise UserError(
                f"{batch.source}: {format_name} dumps hold texts without token ids, and conflicts are between tokens; add "
                "--tokenizer DIR, the folder of the model that was trained"
            )
        ids = self._tokenizer(list(batch.texts or ()), add_special_tokens=False)["input_ids"]
        token_ids, offsets = flat(ids)
        return replace(batch, token_ids=token_ids, offsets=offsets)

    def string(self, token: int) -> str | None:
        """A token's text; None without a tokenizer."""
        if not self.known:
            return None
        if token not in self._strings:
            self._strings[token] = self._tokenizer.decode([token])
        return self._strings[token]

    def text(self, tokens: np.ndarray) -> str | None:
        """The text of tokens; None without a tokenizer."""
        return self._tokenizer.decode(tokens.tolist()) if self.known else None

    def _check(self, batch: Completions) -> None:
        top = len(self._tokenizer) if self.known else 2**31
        outside = (batch.token_ids < 0) | (batch.token_ids >= top)
        if outside.any():
            place = int(outside.argmax())
            row = int(np.searchsorted(batch.offsets, place, side="right")) - 1
            raise UserError(
                f"{batch.source}, {batch.unit} {batch.rows[row]}: token {place - batch.offsets[row]} of the completion is "
                f"{batch.token_ids[place]}, outside the vocabulary (0 to {top - 1}); is this the tokenizer of the model that "
                "was trained?"
            )
