#!/usr/bin/env python
"""Change the code in small ways and see whether its tests notice: which mutants survive, by file.

tools/mutants.py                                all files of TESTS, 12 mutants a file
tools/mutants.py --mutants 0 --only algorithm   every mutant of the files whose path contains "algorithm"
tools/mutants.py --seed 1 --output docs/results/mutants.md

A mutant is one change: a comparison, an operator, a constant, a condition, a min or max, a sum or mean. It is killed when a
test of the file's own fails, errs, or takes many times as long as without it (`mutants_bench.py`). Survivors are listed with
file, line and change: close them by a test, or say in EQUIVALENT why no test can tell them apart.
"""

import ast
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from mutants_bench import Bench

ROOT = Path(__file__).resolve().parents[1]
HEAD_TESTS = (
    "tests/policy/test_tiles.py",
    "tests/policy/test_head.py",
    "tests/policy/test_head_tensor_parallel.py",
    "tests/policy/test_head_reference_entropy.py",
)
RUN_TESTS = ("tests/run/test_batches.py", "tests/run/test_rounds.py", "tests/run/test_ahead.py")
# a file or folder of the package -> the tests that are to notice
TESTS: dict[str, tuple[str, ...]] = {
    "algorithm": ("tests/algorithm",),
    "trajectories": ("tests/trajectories",),
    "policy/head/function.py": HEAD_TESTS,
    "policy/head/tiles.py": HEAD_TESTS,
    "policy/head/torch_head.py": HEAD_TESTS,
    "policy/objective.py": ("tests/policy/test_objective.py",),
    "run/batches.py": RUN_TESTS,
    "run/rounds.py": RUN_TESTS,
    "run/queue.py": ("tests/run/test_queue.py",),
    "rollout/collect.py": ("tests/rollout/test_collect.py",),
}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Mod: ast.Mult,
}  # fmt: skip
# functions by names that both exist: of builtins, and of methods and modules
BUILTINS = {"min": "max", "max": "min", "any": "all", "all": "any"}
NAMES = BUILTINS | {"amax": "amin", "minimum": "maximum", "maximum": "minimum", "sum": "mean", "mean": "sum",
                    "argmin": "argmax", "argmax": "argmin", "exp": "expm1", "zeros_like": "ones_like"}  # fmt: skip
OPPOSITES = (
    ast.Eq,
    ast.NotEq,
    ast.In,
    ast.NotIn,
    ast.Is,
    ast.IsNot,
)  # of which the changed comparison is the negation
# (path, change, what its line holds) of survivors that no test can tell from the original, and why
EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("algorithm/baselines.py", "`0.0` to `1.0`", "torch.where(weights != 0, logprobs"): "what replaces an uncounted log-probability is multiplied by weight 0",
    ("algorithm/conflicts.py", "`BLOCK_TOKENS // row.numel()` to `BLOCK_TOKENS * row.numel()`", ""): "a wider block: speed alone",
    ("algorithm/conflicts.py", "`2` to `3`", "2 * width"): "how fast the blocks widen: speed alone",
    ("algorithm/losses.py", "`0.0` to `1.0`", "torch.where(counted, logprobs - old"): "the ratio of an uncounted token is multiplied by weight 0, or masked",
    ("trajectories/analysis.py", "`1` to `2`", "max(int(lengths.sum()), 1)"): "without tokens there is nothing to divide",
    ("rollout/collect.py", "`1` to `2`", "generate_state(1,"): "the first of two words is that of one",
    ("policy/head/tiles.py", "`vocab_tile > 256` to `vocab_tile >= 256`", ""): "256 is a multiple of itself",
}  # fmt: skip


TITLE = """# Mutants

`make mutants` changes the code in small ways, one at a time, and runs the tests of the changed file. A file's line is that of
its newest trial (`tools/mutants.py --only PATH --output docs/results/mutants.md` renews it).

"""


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str  # below gtpo_megatron/
    line: int
    change: str
    code: str  # the line
    source: str  # the whole changed file

    @property
    def equivalent(self) -> str | None:
        """Why no test can notice it, where that is so."""
        for (path, change, code), why in EQUIVALENT.items():
            if (path, change) == (self.path, self.change) and code in self.code:
                return why
        return None


def mutants(path: str, text: str) -> list[Mutant]:
    """Every mutant of a file, in the order of its lines."""
    found = []
    count = sum(1 for _ in _edits(ast.parse(text)))
    for number in range(count):
        tree = ast.parse(text)
        for index, (node, apply) in enumerate(_edits(tree)):
            if index == number:
                before = ast.unparse(node)
                apply()
                after = f"not ({before})" if apply.place == "test" else ast.unparse(node)
                line = text.splitlines()[node.lineno - 1]
                found.append(Mutant(path, node.lineno, f"`{before}` to `{after}`", line, ast.unparse(tree)))
                break
    return found


def _edits(tree: ast.AST) -> Iterator[tuple[ast.expr, "_Edit"]]:
    """Each expression that can be changed, with the change: none that fails wherever it is read, none twice."""
    types = {id(node) for annotation in _annotations(tree) for node in ast.walk(annotation)}
    for node in ast.walk(tree):
        if id(node) in types:
            continue
        if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
            yield node, _Edit(node.ops, 0, COMPARISONS[type(node.ops[0])]())
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            yield node, _Edit(node, "op", OPERATORS[type(node.op)]())
        elif isinstance(node, ast.BoolOp):
            yield node, _Edit(node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)) and not _is_opposed(node.test):
            yield node.test, _Edit(node, "test", ast.UnaryOp(ast.Not(), node.test))
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield node, _Edit(node, "value", node.value + 1)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in NAMES:
            yield node.func, _Edit(node.func, "attr", NAMES[node.func.attr])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
            yield node.func, _Edit(node.func, "id", BUILTINS[node.func.id])


def _annotations(tree: ast.AST) -> Iterator[ast.AST]:
    """Types are not arithmetic: `Tensor | None`."""
    for node in ast.walk(tree):
        for place in ("annotation", "returns"):
            if (annotation := getattr(node, place, None)) is not None:
                yield annotation


def _is_opposed(test: ast.expr) -> bool:
    """Whether the negation of a condition is among the changes of comparisons."""
    return isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], OPPOSITES)


@dataclass(frozen=True)
class _Edit:
    target: object
    place: str | int
    value: object

    def __call__(self) -> None:
        if isinstance(self.place, int):
            self.target[self.place] = self.value  # type: ignore[index]
        else:
            setattr(self.target, self.place, self.value)


def sources(only: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Files to mutate, with their tests."""
    for place, tests in TESTS.items():
        whole = ROOT / "gtpo_megatron" / place
        for file in sorted(whole.rglob("*.py")) if whole.is_dir() else [whole]:
            name = file.relative_to(ROOT / "gtpo_megatron").as_posix()
            if only in name and file.name != "__init__.py":
                yield name, tests


@dataclass(frozen=True)
class Outcome:
    """What became of a file's sampled mutants."""

    path: str
    sample: str  # which of them were tried
    tried: int
    survivors: list[Mutant]

    def lines(self) -> tuple[str, list[str]]:
        """Markdown: the row of the table, and the survivors."""
        argued = sum(1 for mutant in self.survivors if mutant.equivalent)
        killed, left = self.tried - len(self.survivors), len(self.survivors) - argued
        row = f"| `{self.path}` | {self.sample} | {self.tried} | {killed} | {argued} | {left} |"
        return row, [f"- `{m.path}`:{m.line} {m.change}{_why(m)}" for m in self.survivors]


HEAD = [
    "| file | sample | mutants | killed | equivalent | survivors |",
    "| --- | --- | --- | --- | --- | --- |",
]


def page(outcomes: list[Outcome], previous: str = "") -> str:
    """Markdown: what became of the mutants by file, then the survivors; other files' lines of a `previous` page are kept."""
    fresh = tuple(f"`{outcome.path}`" for outcome in outcomes)
    old = [
        line for line in previous.splitlines() if line[2:].startswith("`") and not line[2:].startswith(fresh)
    ]
    both = [outcome.lines() for outcome in outcomes]
    rows = sorted([row for row, _ in both] + [line for line in old if line.startswith("| ")])
    survivors = sorted(
        [line for _, lines in both for line in lines] + [line for line in old if line.startswith("- ")]
    )
    tried, killed, argued, left = (
        sum(int(row.split("|")[column]) for row in rows) for column in (3, 4, 5, 6)
    )
    share = 100 * (killed + argued) / max(tried, 1)
    total = f"{tried} mutants of {len(rows)} files: {killed} killed, {argued} argued equivalent ({share:.0f}% together), {left} left."
    return (
        "\n".join([total, "", *HEAD, *rows, *(["", "Survivors:", "", *survivors] if survivors else [])])
        + "\n"
    )


def _why(mutant: Mutant) -> str:
    return f": equivalent: {mutant.equivalent}" if mutant.equivalent else ""


def main(
    mutants_per_file: Annotated[int, typer.Option("--mutants", min=0, help="Sampled per file; 0: all")] = 12,
    seed: Annotated[int, typer.Option(help="Of the sample")] = 0,
    only: Annotated[str, typer.Option(help="Files whose path contains this")] = "",
    output: Annotated[Path | None, typer.Option(help="Write the table there as well")] = None,
) -> None:
    """Mutate, test, print the table. Exit code 1 when a mutant survives that is not argued to be equivalent."""
    output = output and output.resolve()
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(ROOT, Path(directory).resolve())
        outcomes = []
        for path, tests in sources(only):
            outcomes.append(tried(bench, path, tests, mutants_per_file, seed))
            if output is not None:  # after each file: a trial that is ended early leaves what it found
                previous = output.read_text(encoding="utf-8") if output.exists() else ""
                output.write_text(f"{TITLE}{page(outcomes, previous)}", encoding="utf-8")
    typer.echo(page(outcomes))
    raise typer.Exit(int(any(not mutant.equivalent for outcome in outcomes for mutant in outcome.survivors)))


def tried(bench: Bench, path: str, tests: tuple[str, ...], count: int, seed: int) -> Outcome:
    """A sample of a file's mutants against its tests."""
    bench.learn(tests)
    bench.check(path, tests)
    every = mutants(path, (ROOT / "gtpo_megatron" / path).read_text(encoding="utf-8"))
    # a file's own sample, whichever files are tried beside it
    chosen = every if not count else random.Random(f"{seed} {path}").sample(every, min(count, len(every)))
    survivors = []
    for mutant in sorted(chosen, key=lambda m: m.line):
        if not bench.kills(path, mutant.line, mutant.source, tests):
            survivors.append(mutant)
            typer.echo(f"survived: {mutant.path}:{mutant.line} {mutant.change}", err=True)
    sample = "all" if len(chosen) == len(every) else f"of {len(every)}, seed {seed}"
    return Outcome(path, sample, len(chosen), survivors)


if __name__ == "__main__":
    typer.run(main)
