"""A replay as one rank of the pool does it: like the command, in a process of its own."""

from pathlib import Path
from typing import Any

from gtpo_megatron.errors import UserError


def run_replay(run_dir: Path, step: int) -> dict[str, Any] | str:
    """What the replay found, or the message of its UserError."""
    from gtpo_megatron.replay.replay import replay

    said: list[str] = []
    try:
        return replay(run_dir, step, say=said.append).as_dict() | {"said": said}
    except UserError as error:
        return str(error)
