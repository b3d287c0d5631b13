"""TRL: `<output_dir>/completions/completions_00012.parquet`, as GRPOTrainer writes it with log_completions.

Columns: step, prompt, completion, one for each reward function, extra ones, advantage (trl/trainer/grpo_trainer.py).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gtpo_megatron.analysis.dump import Completions, group_numbers
from gtpo_megatron.analysis.readers.files import parquet_columns, parquet_table
from gtpo_megatron.errors import UserError

FORMAT = "trl"
LACKS = (
    "token ids: the completions' texts are tokenized again, which may differ from what was sampled, and the end-of-turn "
    "token is not there",
    "sampler's log-probabilities, finish reasons and weight versions",
    "weights of the reward functions: advantages are TRL's own, and a reward is known only where there is one function",
    "group numbers: completions of one prompt and step are taken as a group",
)
_FIXED = {"step", "prompt", "completion", "advantage"}


def recognise(path: Path) -> bool:
    """Whether the file is a table of completions by TRL."""
    found = parquet_columns(path)
    return found is not None and set(found[0]) >= _FIXED


def read(path: Path) -> Iterator[Completions]:
    """The completions of a file, a step at a time.

    Raises:
        UserError: the file is damaged, or a row has no advantage.
    """
    table = parquet_table(path)
    rewards = {
        name: table[name].to_numpy().astype(np.float64)
        for name in table.column_names
        if name not in _FIXED and pa.types.is_floating(table.schema.field(name).type)
    }
    steps, advantages = table["step"].to_numpy(), table["advantage"].to_numpy().astype(np.float64)
    if len(bad := np.flatnonzero(~np.isfinite(advantages))):
        raise UserError(f"{path}, row {bad[0]}: advantage is {advantages[bad[0]]}, not a finite number")
    prompts = [_text(value) for value in table["prompt"].to_pylist()]
    texts = [_text(value) for value in table["completion"].to_pylist()]
    only = next(iter(rewards.values())) if len(rewards) == 1 else None
    for step in np.unique(steps):
        rows = np.flatnonzero(steps == step)
        yield Completions(
            step=int(step),
            source=path,
            rows=rows,
            groups=group_numbers([prompts[row] for row in rows]),
            token_ids=None,
            offsets=None,
            rewards=None if only is None or np.isnan(only[rows]).any() else only[rows],
            advantages=advantages[rows],
            texts=[texts[row] for row in rows],
            prompts=[prompts[row] for row in rows],
            terms={name: values[rows] for name, values in rewards.items()},
        )


def _text(value: Any) -> str:
    """A prompt or completion: plain text, or a list of chat messages."""
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return "\n".join(str(message.get("content") or "") for message in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
