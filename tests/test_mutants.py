"""The tool that changes the code to see whether tests notice: what it changes, what it calls killed, and its page."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"
NUMBERS = """
    LIMIT = 3


    def larger(a: int, b: int | None) -> int:
        return a if a > b else b


    def down(n: int) -> int:
        while n > 0:
            n = n - 1
        return n
    """
TEST = """
    import multiprocessing

    from gtpo_megatron.user import down, larger, limited


    def test_larger() -> None:
        assert (larger(1, 2), larger(2, 1)) == (2, 2)


    def test_down_in_another_process() -> None:
        with multiprocessing.get_context("forkserver").Pool(1) as pool:
            assert pool.map(down, [2, 0]) == [0, 0]


    def test_down() -> None:
        assert down(2) == 0
        assert limited(5) == 3
    """
USER = (
    "from gtpo_megatron.numbers import LIMIT, down, larger\n\n\ndef limited(n):\n    return min(n, LIMIT)\n"
)
TRIALS = """
    import json, sys
    from pathlib import Path

    import mutants_bench
    from mutants import mutants

    mutants_bench.PATIENCE_S = 0.5
    root, copy = map(Path, sys.argv[1:])
    bench, tests = mutants_bench.Bench(root, copy), ("tests/test_numbers.py",)
    bench.learn(tests)
    bench.check("numbers.py", tests)
    text = (root / "gtpo_megatron/numbers.py").read_text()
    found = {m.change: bench.kills(m.path, m.line, m.source, tests) for m in mutants("numbers.py", text)}
    entered = {name.split("::")[1]: sorted(known.entered) for name, known in bench.known[tests].items()}
    print(json.dumps([found, entered]))
    """


@pytest.fixture
def mutants(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    import mutants

    return mutants


def test_a_mutant_is_killed_by_a_failure_or_an_endless_loop_and_else_survives(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name, text in {
        "gtpo_megatron/__init__.py": "",
        "gtpo_megatron/numbers.py": NUMBERS,
        "gtpo_megatron/user.py": USER,
        "tests/__init__.py": "",
        "tests/conftest.py": "",
        "tests/test_numbers.py": TEST,
        "pyproject.toml": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text).lstrip())
    (tmp_path / "copy").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRIALS), str(root), str(tmp_path / "copy")],
        env={"PYTHONPATH": str(TOOLS), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    found, entered = json.loads(done.stdout.splitlines()[-1])
    assert found == {
        "`3` to `4`": True,
        "`a > b` to `not (a > b)`": True,
        "`a > b` to `a >= b`": False,  # no test can tell
        "`n > 0` to `not (n > 0)`": True,
        "`n > 0` to `n >= 0`": True,
        "`0` to `1`": True,
        "`n - 1` to `n + 1`": True,  # for ever
        "`1` to `2`": False,  # from 2 it comes to 0 all the same: the bench does not kill whatever it is given
    }
    assert entered["test_larger"] == ["gtpo_megatron/numbers.py:4"]
    assert entered["test_down"] == ["gtpo_megatron/numbers.py:8", "gtpo_megatron/user.py:4"]
    assert (root / "gtpo_megatron/numbers.py").read_text() == textwrap.dedent(NUMBERS).lstrip()


def test_only_what_can_run_is_changed_and_nothing_twice(mutants: ModuleType) -> None:
    source = "def f(a: int | str, maximum: float) -> int | None:\n    if a == maximum:\n        return sum(a)\n    return max(a.sum(), maximum)\n"
    assert [mutant.change for mutant in mutants.mutants("f.py", source)] == [
        "`a == maximum` to `a != maximum`",
        "`max` to `min`",
        "`a.sum` to `a.mean`",
    ]


def test_the_page_keeps_the_lines_of_files_that_were_not_tried_again(mutants: ModuleType) -> None:
    def outcome(path: str, tried: int, lines: tuple[int, ...]) -> object:
        survivors = [mutants.Mutant(path, line, "`1` to `2`", "", "") for line in lines]
        return mutants.Outcome(path, "all", tried, survivors)

    first = mutants.page([outcome("run/a.py", 10, (1, 2)), outcome("run/ab.py", 4, (3,))])
    second = mutants.page([outcome("run/a.py", 12, ())], f"{mutants.TITLE}{first}\nA remark.\n")
    assert second == mutants.page([outcome("run/a.py", 12, ()), outcome("run/ab.py", 4, (3,))])
    assert "16 mutants of 2 files: 15 killed, 0 argued equivalent (94% together), 1 left." in second
