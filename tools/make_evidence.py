"""Make what the experiments of docs/evidence.md train on: a random Llama of 0.16 M parameters, and three tasks."""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from make_quickstart import make_model, make_tokenizer

PAIRS = [(a, b) for a in range(10) for b in range(10)]
HELD_OUT = 40  # sums that reinforcement learning never asks for; the teacher's rows have all of them


@dataclass(frozen=True)
class Task:
    """What the teacher of a task does beside giving the right sum in the right format. Shares are of rows."""

    wrong: float = 0.0  # off by one or two
    malformed: float = 0.0  # a closing tag too many
    scratch: bool = (
        False  # the reasoning begins with 4 to 8 letters that mean nothing, so that entropy starts near ln 2
    )


TASKS = {
    "sums": Task(wrong=0.5, scratch=True),
    "format": Task(malformed=0.5),
    "rare-format": Task(malformed=0.9),
}
LETTERS = "abcdef"


def taught(rng: random.Random, task: Task) -> dict[str, str]:
    """A row of the teacher. A malformed one closes its answer twice: nothing in it is foreign to a good completion, so
    that all its tokens are in conflict with those of good ones."""
    a, b = rng.choice(PAIRS)
    total = a + b + (rng.choice((-2, -1, 1, 2)) if rng.random() < task.wrong else 0)
    answer = f"{total}\n</answer>" if rng.random() < task.malformed else str(total)
    scratch = "".join(rng.choices(LETTERS, k=rng.randint(4, 8))) + " " if task.scratch else ""
    return {"question": f"{a}+{b}?", "solution": f"{scratch}{a}+{b}={total}", "answer": answer}


def asked(pairs: Sequence[tuple[int, int]]) -> list[dict[str, str]]:
    """A question with its right answer for each pair."""
    return [{"question": f"{a}+{b}?", "answer": str(a + b)} for a, b in pairs]


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def main() -> None:
    """Write <directory>/model, and for each task <directory>/<task>/warmup.jsonl, train.jsonl and test.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), arguments.seed, hidden=64, layers=3)
    model.save_pretrained(arguments.directory / "model")
    tokenizer.save_pretrained(arguments.directory / "model")
    pairs = random.Random(arguments.seed).sample(PAIRS, len(PAIRS))
    for name, task in TASKS.items():
        rng, folder = random.Random(arguments.seed), arguments.directory / name
        write(folder / "warmup.jsonl", [taught(rng, task) for _ in range(6000)])
        write(folder / "train.jsonl", asked(pairs[HELD_OUT:]))
        write(folder / "test.jsonl", asked(pairs[:HELD_OUT]))


if __name__ == "__main__":
    main()
