"""One self-contained page of a dump: figures at once, completions in compressed parts that the browser opens when looked at."""

import base64
import gzip
import json
import zlib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gtpo_megatron.analysis.conflict import Examined
from gtpo_megatron.analysis.tokens import Vocabulary
from gtpo_megatron.errors import UserError

WHOLE_TOKENS = 4_000_000  # of a page; completions behind these are shown by their two ends
END_TOKENS = 64
PART_COMPLETIONS = 1024  # whole groups
PROMPT_CHARACTERS = 4000
_DATA, _TITLE, _PROGRAM = "<!-- data -->", "<!-- title -->", "/* program */"
Json = dict[str, Any]


class Page:
    """Collects completions, compressed as they come, and writes the page.

    Args:
        vocabulary: gives tokens their text.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._parts: list[str] = []
        self._index: list[Json] = []
        self._tokens = self._side = 0

    def beside(self, vocabulary: Vocabulary) -> None:
        """What is added from now on is of another dump, shown beside the first."""
        self._side, self._vocabulary = 1, vocabulary

    def add(self, examined: Examined, step: Json) -> None:
        """Put a step's completions on the page."""
        for number, groups in enumerate(_parts(examined.batch.groups)):
            content = self._part(examined, groups)
            data = json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode()
            self._parts.append(base64.b64encode(gzip.compress(data, 6, mtime=0)).decode())
            entry = {"step": step["step"], "part": number, "groups": len(groups)}
            if self._side:
                entry |= {"side": self._side, "keys": [group["key"] for group in content["groups"]]}
            self._index.append(entry)

    def write(self, path: Path, figures: Json, title: str, other: Json | None = None) -> None:
        """Write the page; whole or not at all. `other`: title and `by_step` of the run beside.

        Raises:
            UserError: it cannot be written.
        """
        template, program = (
            files("gtpo_megatron.analysis").joinpath(name).read_text(encoding="utf-8")
            for name in ("page.html", "page.js")
        )
        head, tail = template.replace(_TITLE, _escaped(title)).split(_DATA)
        tail = tail.replace(_PROGRAM, program)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(head)
                summary = json.dumps(
                    {"title": title, "figures": figures, "parts": self._index, "other": other}
                )
                # In a script element only a tag can end it; "<" is written so that no text of the dump can hold one.
                file.write('<script type="application/json" id="summary">')
                file.write(summary.replace("<", "\\u003c"))
                file.write("</script>\n")
                for number, part in enumerate(self._parts):
                    file.write(f'<script type="text/plain" id="part-{number}">{part}</script>\n')
                file.write(tail)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"{path}: the page cannot be written: {error.strerror}") from error

    def _part(self, examined: Examined, groups: list[tuple[int, NDArray[np.int64]]]) -> Json:
        used: set[int] = set()
        content = [
            {
                "g": group,
                "prompt": self._prompt(examined, int(rows[0])),
                "key": _key(examined, int(rows[0])),
                "c": [self._completion(examined, int(row), used) for row in rows],
            }
            for group, rows in groups
        ]
        strings = {
            token: text for token in sorted(used) if (text := self._vocabulary.string(token)) is not None
        }
        return {"groups": content, "v": strings}

    def _completion(self, examined: Examined, row: int, used: set[int]) -> Json:
        batch, length = examined.batch, int(examined.lengths[row])
        whole = self._tokens < WHOLE_TOKENS or length <= 2 * END_TOKENS
        shown = np.arange(length)
        if not whole:
            shown = np.concatenate([shown[:END_TOKENS], shown[-END_TOKENS:]])
        self._tokens += len(shown)
        at = batch.offsets[row] + shown
        tokens = batch.token_ids[at].tolist()
        used.update(tokens)
        completion: Json = {
            "row": int(batch.rows[row]),
            "a": _rounded(examined.advantages[row]),
            "n": length,
            "p": int(examined.prefix[row]),
            "s": int(examined.suffix[row]),
            "t": tokens,
        }
        if batch.rewards is not None:
            completion["r"] = _rounded(batch.rewards[row])
        if batch.logprobs is not None:
            completion["lp"] = _hundredths(batch.logprobs[at])
        if batch.entropies is not None:
            completion["e"] = _hundredths(batch.entropies[at])
        if batch.trainer_logprobs is not None:
            completion["tl"] = _hundredths(batch.trainer_logprobs[at])
        for name, values in (("h", batch.mean_entropies), ("gate", batch.gates)):
            if values is not None:
                completion[name] = _rounded(values[row])
        if batch.coefficients is not None:
            completion["k"] = float(f"{batch.coefficients[row]:.4g}")
        if batch.truncated is not None:
            completion["u"] = bool(batch.truncated[row])
        if batch.staleness is not None:
            completion["age"] = _rounded(batch.staleness[row])
        if batch.terms:
            completion["terms"] = {name: _rounded(values[row]) for name, values in batch.terms.items()}
        if not self._vocabulary.known and batch.texts is not None:
            completion["x"] = batch.texts[row][: 8 * len(shown)]
        return completion

    def _prompt(self, examined: Examined, row: int) -> str:
        batch = examined.batch
        if batch.prompts is not None:
            return batch.prompts[row][:PROMPT_CHARACTERS]
        if batch.prompt_ids is None:
            return ""
        text = self._vocabulary.text(batch.prompt_ids[row])
        return (text or " ".join(map(str, batch.prompt_ids[row])))[:PROMPT_CHARACTERS]


def _parts(groups: NDArray[np.int64]) -> Iterator[list[tuple[int, NDArray[np.int64]]]]:
    """(group, its rows), in parts of a bounded number of completions."""
    order = np.argsort(groups, kind="stable")
    part: list[tuple[int, NDArray[np.int64]]] = []
    size = 0
    for rows in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        if part and size + len(rows) > PART_COMPLETIONS:
            yield part
            part, size = [], 0
        part.append((int(groups[rows[0]]), rows))
        size += len(rows)
    if part:
        yield part


def _key(examined: Examined, row: int) -> str:
    """The same for the same prompt, in whichever run; empty where the dump has no prompts."""
    batch = examined.batch
    if batch.prompt_ids is not None:
        content = np.asarray(batch.prompt_ids[row], np.int32).tobytes()
    else:
        content = batch.prompts[row].encode() if batch.prompts is not None else b""
    return f"{zlib.crc32(content):08x}" if content else ""


def _hundredths(values: NDArray[np.float32]) -> list[int]:
    return np.rint(np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=-99.0) * 100).astype(np.int32).tolist()


def _rounded(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
