"""What a server must serve to take the weights of this policy: told apart before the first tensor is sent to it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gtpo_megatron.rollout.sglang.client import ServerFault, ServerInfo

# of config.json: those that decide the shapes of tensors, and the meaning of token ids
KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


class OtherModel(ServerFault):
    """A server serves another model, or in another type of numbers."""


@dataclass(frozen=True)
class ServedModel:
    """The policy as a server would describe it."""

    path: str
    dtype: str  # as SGLang names it
    config: Mapping[str, Any]  # of config.json; empty where it cannot be read here

    @classmethod
    def at(cls, path: str, dtype: str) -> "ServedModel":
        """The Hugging Face checkpoint in this folder."""
        return cls(path, dtype, _config(path))

    def check(self, url: str, info: ServerInfo) -> None:
        """Compare a server with it, as far as the server says and its own checkpoint can be read here.

        Raises:
            OtherModel: names the server, what it has and what the policy has.
        """
        theirs = _config(info.model_path) if info.model_path != self.path else {}
        found = {"dtype": info.dtype, "architectures": list(info.architectures)}
        found |= {key: theirs.get(key) for key in KEYS}
        ours = {"dtype": self.dtype} | {key: self.config.get(key) for key in ("architectures", *KEYS)}
        wrong = [
            f"{key} {value}, not {ours[key]}"
            for key, value in found.items()
            if value not in (None, [], "", "auto") and ours[key] is not None and value != ours[key]
        ]
        if wrong:
            raise OtherModel(
                f"{url} serves another model ({info.model_path}) than the policy ({self.path}): {'; '.join(wrong)}"
            )


def _config(path: str) -> dict[str, Any]:
    try:
        found = json.loads((Path(path) / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
