"""The paper's recipes, the very files, made small: an overlay that swaps model, data, lengths and steps."""

import json
from pathlib import Path
from typing import Any

import yaml

from tests.tiny_models import make_tiny_checkpoint

PAPER = Path(__file__).parents[1] / "recipes" / "paper"
STEPS = 2
ROWS = {
    "gsm8k": lambda i: {"question": f"{i}+1?", "answer": f"add one\n#### {i + 1}"},
    "math": lambda i: {"problem": f"{i}+1?", "solution": f"it is \\boxed{{{i + 1}}}"},
}


def paper_files(*names: str) -> list[Path]:
    """A recipe and its overlays, by their names without suffix."""
    return [PAPER / f"{name}.yaml" for name in names]


def write_toy_overlay(folder: Path, **sections: dict[str, Any]) -> Path:
    """Write a tiny model, rows of both sets and the overlay that names them into `folder`; the overlay's path.

    `sections` are added to the overlay, key by key. The recipes' layouts stay: the model has heads for tensor 4.
    """
    make_tiny_checkpoint(folder / "model", "llama", num_key_value_heads=4)
    for name, row in ROWS.items():
        (folder / name).mkdir()
        for split in ("train", "test"):
            lines = [json.dumps(row(i)) + "\n" for i in range(8)]
            (folder / name / f"{split}.jsonl").write_text("".join(lines))
    data = {"path": f"{folder}/${{data.format}}", "name": None, "max_prompt_tokens": 192}
    overlay: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder / "model"), "tokenizer": None, "dtype": "fp32"},
        "data": data,
        "evaluation": {"data": data | {"limit": 2}},
        "rollout": {"max_new_tokens": 16},
        "training": {"steps": STEPS, "sft_batch_size": 2, "micro_batch_tokens": 512},
        "optimizer": {"warmup_steps": 1},
    }
    for name, section in sections.items():
        overlay[name] = overlay.get(name, {}) | section
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({"dir": str(folder / "runs")} | overlay))
    return path
