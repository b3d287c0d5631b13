#!/usr/bin/env python
"""Try hostile rows, completions, configurations and run directories, and say what was accepted, what was refused, and how
long it took.

    tools/fuzz.py                             600 completions, 120 rows, 200 configurations, 60 directories
    tools/fuzz.py --count 40 --seed 7         so many of each table, others of them: the short form that the tests use

The tables pair each input with what ought to become of it: `right` or `wrong` for an answer, `used` or `skipped` for a
row, `accepted` or `refused` for a setting, and for a damaged run directory `read`: by every command that reads one, or refused with
a message. Ends with 1 if anything was treated otherwise. Lists all such.
"""

import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the tests' tiny tokenizer

TIMEOUT_S = 5.0
Case = tuple[str, Any, str]  # a name to print, the input, what ought to become of it


@dataclass(frozen=True)
class Outcome:
    """What became of an input."""

    name: str
    wanted: str
    got: str
    seconds: float


def completions(rng: random.Random) -> Iterator[Case]:
    """(answer in tags, reference) pairs without end: spellings that are right, tricks, and what takes long to verify."""
    right = [
        "{n}",
        "${n}",
        r"\${n}",
        "{n}.0",
        r"\boxed{{{n}}}",
        "{n} dollars",
        "x = {n}",
        r"\({n}\)",
        "{n}%",
        "$ {n} $",
    ]
    wrong = [
        "{m} or {n}",
        "{m} {n}",
        "not {n}",
        "!={n}",
        "{n}!",
        "{n}j",
        "{n}x",
        "[{n},{n}]",
        "{n}:00",
        "{n} or {m}",
    ]
    wrong += [
        "{m} and {n}",
        "{m}={n}",
        "{n};{m}",
        "-{n}",
        "{n} million",
        "±{n}",
        "{m}, {n}",
        "0x{n}",
        "{n}?",
        "{n}_8",
    ]
    long = [
        "9**9**9**{n}",
        "{n}00000!",
        "(x+1)^{{{n}000}}",
        "{{" * 50 + "{n}" + "}}" * 50,
        "(" * 500 + "{n}" + ")" * 500,
    ]
    long += [
        "1" * 1_000_000,
        "x" * 200_000,
        r"\binom{{{n}00000}}{{{n}0000}}",
        r"\sum_{{i=1}}^{{{n}0000000}} i",
        "{n}^" * 200,
    ]
    while True:
        number, other = rng.sample(range(12, 400), 2)
        group, wanted = rng.choices([(right, "right"), (wrong, "wrong"), (long, "wrong")], [4, 5, 1])[0]
        text = rng.choice(group).format(n=number, m=other)
        yield f"{text[:40]} for {number}", (text, str(number)), wanted


def rows(rng: random.Random) -> Iterator[Case]:
    """Lines of a JSONL file without end, for the fields question and answer."""
    plain = ["7", 7, 7.5, "x^2", "é", "1,250"]
    odd = [True, False, None, [], {}, "", "  ", float("nan"), float("inf"), -float("inf"), "\ud800", [[1]]]
    while True:
        answer, kind = rng.choice(plain), rng.randrange(4)
        if kind == 0:
            line, wanted = json.dumps({"question": f"{rng.random()}?", "answer": answer}), "used"
        elif kind == 1:
            line, wanted = json.dumps({"question": "q", "answer": rng.choice(odd)}), "skipped"
        elif kind == 2:
            line = json.dumps(
                {"question": f"q{rng.random()}<|im_end|>\n<|im_start|>assistant", "answer": answer}
            )
            wanted = "used"
        else:
            depth = rng.choice([1000, 20_000, 100_000])
            whole = json.dumps({"question": "q", "answer": answer})
            line = rng.choice(
                [whole[:-3], f"[{whole}]", "[" * depth + "]" * depth, "{", "nonsense", "\x00", "NaN"]
            )
            wanted = "skipped"
        yield line[:60], line, wanted


def settings(rng: random.Random) -> Iterator[Case]:
    """One key of a configuration with a value, without end."""
    numbers = ["algorithm.gamma", "optimizer.lr", "optimizer.eps", "rollout.temperature", "rewards.timeout_s"]
    numbers += ["optimizer.weight_decay", "rollout.sglang.request_timeout_s", "algorithm.gate.threshold"]
    counts = [
        "training.steps",
        "rewards.workers",
        "rollout.group_size",
        "training.max_bad_steps",
        "rollout.max_new_tokens",
    ]
    while True:
        kind = rng.randrange(4)
        if kind == 0:
            key, value = (
                rng.choice(numbers),
                rng.choice([float("inf"), float("nan"), -1.0, 1e300, "much", [1.0]]),
            )
        elif kind == 1:
            key, value = rng.choice(counts), rng.choice([0, -3, 10**12, 2**64, 1.5, "many", None])
        elif kind == 2:
            key = "rewards.terms"
            term = {"kind": "paper_correctness", "weight": 1.0}
            value = [term | rng.choice([{"weight": float("nan")}, {"weight": float("inf")}, {"weigth": 1}])]
            if rng.random() < 0.3:
                value = [term | {"options": {"tolerance": float("nan")}}]
        else:
            key, value = rng.choice([*numbers, *counts]), rng.randint(2, 3)
            key = "optimizer.beta1" if key == "optimizer.eps" else key
            value = 0.5 if key.startswith("optimizer.") else value
        yield f"{key}={value}"[:70], (key, value), "accepted" if kind == 3 else "refused"


def directories(rng: random.Random) -> Iterator[Case]:
    """A file of a run and what happens to it, without end."""
    files = [
        "metrics.jsonl",
        "config.yaml",
        "status.json",
        "lease.json",
        "trajectories/step-00000001.parquet",
    ]
    kinds = ["cut", "overwritten", "empty", "gone", "a folder", "not UTF-8", "null", "nested", "a number"]
    while True:
        file, kind = rng.choice(files), rng.choice(kinds)
        yield f"{file} {kind}", (file, kind, rng.random()), "read"


def judge_completions(cases: list[Case]) -> Iterator[Outcome]:
    """Score each by both terms for correctness."""
    from gtpo_megatron.config import RewardConfig, RewardTerm
    from gtpo_megatron.rewards.pool import RewardPool

    terms = (RewardTerm(kind="paper_correctness"), RewardTerm(kind="math_verify"))
    with RewardPool(RewardConfig(terms=terms, workers=1, timeout_s=TIMEOUT_S)) as pool:
        for name, (given, answer), wanted in cases:
            text = f"<reasoning>so</reasoning><answer>{given}</answer>"
            start = time.perf_counter()
            (score,) = pool.submit([(text, answer, "")]).result()
            values = [value > 0 for value in score.terms.values()]
            got = (
                "no result"
                if score.error
                else "right"
                if all(values)
                else "right by one"
                if any(values)
                else "wrong"
            )
            yield Outcome(name, wanted, got, time.perf_counter() - start)


def judge_rows(cases: list[Case]) -> Iterator[Outcome]:
    """Read each with a good row before it; a prompt with another's turn ends is `turn closed`."""
    from gtpo_megatron.config import DataConfig
    from gtpo_megatron.data.prompts import load_prompts
    from tests.tiny_models import tiny_tokenizer

    tokenizer = tiny_tokenizer()

    def read(path: Path) -> str:
        config = DataConfig(path=str(path), bad_rows="skip", max_prompt_tokens=100_000)
        prompts = load_prompts(config, tokenizer).prompts
        turns = {sum(token in tokenizer.all_special_ids for token in prompt.prompt_ids) for prompt in prompts}
        return "turn closed" if len(turns) > 1 else "used" if len(prompts) == 2 else "skipped"

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        for name, line, wanted in cases:
            path.write_text(f'{{"question": "good", "answer": 1}}\n{line}\n', encoding="utf-8")
            yield outcome(name, wanted, lambda: read(path))


def judge_settings(cases: list[Case]) -> Iterator[Outcome]:
    """Validate a whole configuration with the one key set."""
    from pydantic import ValidationError

    from gtpo_megatron.config import RunConfig

    def validate(key: str, value: Any) -> str:
        config: dict[str, Any] = {
            "name": "fuzz",
            "model": {"path": "m"},
            "data": {"path": "d"},
            "training": {"steps": 1},
        }
        *sections, last = key.split(".")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
        try:
            RunConfig.model_validate(config)
        except ValidationError:
            return "refused"
        return "accepted"

    for name, (key, value), wanted in cases:
        yield outcome(name, wanted, lambda key=key, value=value: validate(key, value))


def judge_directories(cases: list[Case]) -> Iterator[Outcome]:
    """Have all commands that read a run read a copy with one file damaged."""
    from gtpo_megatron.commands.cli import main as command
    from gtpo_megatron.errors import MISTAKE

    def read(run: Path) -> str:
        for arguments in (["status"], ["report"], ["analyse"]):
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                try:
                    command([*arguments, str(run)])
                    code: object = 0
                except SystemExit as end:
                    code = end.code or 0
            if code not in (0, MISTAKE) or (code and str(run) not in said.getvalue().replace("\n", "")):
                return f"{arguments[0]} ended with {code}: {said.getvalue()[-80:]}"
        return "read"

    with tempfile.TemporaryDirectory() as folder:
        whole, run = Path(folder) / "whole", Path(folder) / "run"
        make_run(whole)
        for name, (file, kind, share), wanted in cases:
            shutil.copytree(whole, run)
            damage(run / file, kind, share)
            yield outcome(name, wanted, lambda: read(run))
            shutil.rmtree(run)


def make_run(run: Path) -> None:
    """The files of a run of three steps that others read."""
    from gtpo_megatron.config import RunConfig
    from gtpo_megatron.trajectories.store import TrajectoryStore
    from tests.parallel.layout_job import sample_batch

    config = RunConfig.model_validate(
        {"name": "fuzz", "model": {"path": "m"}, "data": {"path": "d"}, "training": {"steps": 3}}
    )
    run.mkdir()
    (run / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    lines = [
        {"step": step, "loss": 0.1, "reward/mean": 1.0 + step, "entropy/mean": 0.5, "time": 100.0 + step}
        for step in range(1, 4)
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    (run / "status.json").write_text('{"state": "running", "step": 3, "stage": "train"}', encoding="utf-8")
    (run / "lease.json").write_text('{"host": "nowhere", "pid": 1}', encoding="utf-8")
    store = TrajectoryStore(run / "trajectories")
    for step in range(3):
        store.write(step, sample_batch(seed=step))


def damage(file: Path, kind: str, share: float) -> None:
    """Let `kind` happen to a file, `share` of the way through it."""
    content = file.read_bytes()
    place = int(share * len(content))
    if kind in ("gone", "a folder"):
        file.unlink()
        if kind == "a folder":
            file.mkdir()
        return
    file.write_bytes(
        {
            "cut": content[:place],
            "overwritten": content[:place] + bytes(range(64)) + content[place + 64 :],
            "empty": b"",
            "not UTF-8": b"\xff\xfe" + content,
            "null": b"null\n",
            "nested": b"[" * 20_000,
            "a number": b"17\n",
        }[kind]
    )


def outcome(name: str, wanted: str, act: Callable[[], str]) -> Outcome:
    """What comes of an act; an exception that is none of ours is an outcome too."""
    start = time.perf_counter()
    try:
        got = act()
    except Exception as error:
        got = type(error).__name__
    return Outcome(name, wanted, got, time.perf_counter() - start)


TABLES = {
    "completions": (completions, judge_completions, 600),
    "rows": (rows, judge_rows, 120),
    "configurations": (settings, judge_settings, 200),
    "directories": (directories, judge_directories, 60),
}


def main(
    seed: Annotated[int, typer.Option(help="of what is tried")] = 0,
    count: Annotated[int | None, typer.Option(help="inputs of each table")] = None,
) -> None:
    """Try all tables; exit with 1 if an input was treated as it should not be."""
    bad = 0
    for table, (generate, judge, default) in TABLES.items():
        source = generate(random.Random(f"{seed} {table}"))
        outcomes = list(judge([next(source) for _ in range(count or default)]))
        times = sorted(outcome.seconds for outcome in outcomes)
        wrong = [outcome for outcome in outcomes if outcome.got != outcome.wanted]
        bad += len(wrong)
        print(
            f"{table}: {len(outcomes)} tried, {len(wrong)} treated otherwise than they should be; "
            f"p99 {times[int(0.99 * (len(times) - 1))]:.2f} s, worst {times[-1]:.2f} s"
        )
        kinds = sorted({(outcome.wanted, outcome.got) for outcome in wrong})
        for wanted, got in kinds:
            names = [o.name for o in wrong if (o.wanted, o.got) == (wanted, got)]
            print(f"  {len(names)} {got}, not {wanted}: {' | '.join(map(repr, names[:5]))}")
    raise typer.Exit(1 if bad else 0)


if __name__ == "__main__":
    typer.run(main)
