"""Where mutants are tried: a copy of the tree, and processes forked from one that has imported everything already.

A trial costs what its tests cost, not the 7 s of importing Megatron-Core: a forked process forgets only the changed module and
those that import it. A first run without any change tells how long each test lasts and which functions it enters. Then a
mutant meets only the tests that enter its function, the fastest first, until one fails.
"""

import ast
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

PACKAGE = "gtpo_megatron"
STARTERS = ("/subprocess.py", "/tests/parallel/pool.py")  # where other processes are started
ELSEWHERE = "elsewhere"
PATIENCE_S = 5  # of processor time, for a test that takes next to none
LIMIT_S = 120  # of waiting, for tests that take next to none: on a busy machine that is not long
QUICK_S = 1


@dataclass(frozen=True)
class Known:
    """What the run without any change told of one test."""

    seconds: float
    entered: frozenset[str] | None
    """`path:line` of the functions of the package that it entered; None if that cannot be known"""

    def may_notice(self, function: str | None) -> bool:
        """Whether a change in that function (None: of what runs at import) can reach the test."""
        return function is None or self.entered is None or function in self.entered


@dataclass
class Bench:
    """A copy of the tree below `directory`."""

    root: Path
    directory: Path
    known: dict[tuple[str, ...], dict[str, Known]] = field(default_factory=dict)
    """of the tests of a file, by node id"""

    def __post_init__(self) -> None:
        for name in (PACKAGE, "tests", "pyproject.toml"):
            copy = shutil.copytree if (self.root / name).is_dir() else shutil.copy
            copy(self.root / name, self.directory / name)
        os.environ |= {
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(self.directory),
            "OMP_NUM_THREADS": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # plugins that packages bring are loaded for each trial, and none is needed
        }
        sys.dont_write_bytecode = True
        ours = (self.root, self.root / "tools")
        sys.path[:] = [str(self.directory), *(p for p in sys.path if Path(p or ".").resolve() not in ours)]
        os.chdir(self.directory)
        import hypothesis

        # The first failure is enough: no search for a smaller one, and the same examples for every mutant.
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile(
            "mutants", phases=phases, derandomize=True, database=None, deadline=None
        )
        hypothesis.settings.load_profile("mutants")

    def learn(self, tests: tuple[str, ...]) -> None:
        """Import what the tests import, and run them without any change. Raises ValueError if they fail."""
        if tests in self.known:
            return
        importlib.import_module("tests.conftest")
        for place in tests:
            whole = self.directory / place
            for file in sorted(whole.rglob("test_*.py")) if whole.is_dir() else [whole]:
                name = ".".join(file.relative_to(self.directory).with_suffix("").parts)
                importlib.import_module(name)
        notes = self.directory / "learned.json"
        if not self._forked(tests, None, Learner(self.directory, notes), 1800):
            raise ValueError(f"{' '.join(tests)} fail without any change; mend them first")
        learned = json.loads(notes.read_text(encoding="utf-8"))
        self.known[tests] = {
            name: Known(seconds, None if entered is None else frozenset(entered))
            for name, (seconds, entered) in learned["tests"].items()
        }
        for name in learned["modules"]:  # what tests import while they run
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        gc.collect()
        gc.freeze()  # pages that are not written are not copied

    def kills(self, path: str, line: int, source: str, tests: tuple[str, ...]) -> bool:
        """Whether a test notices that the file `path` of the package, changed in `line`, has become `source`."""
        function = function_at(self.directory / PACKAGE / path, line)
        place = None if function is None else f"{PACKAGE}/{path}:{function}"
        return not self._pass(path, source, tests, lambda known: known.may_notice(place))

    def check(self, path: str, tests: tuple[str, ...]) -> None:
        """Raise ValueError if the quick tests fail against the file as it is: a bench that kills everything shows nothing."""
        source = (self.directory / PACKAGE / path).read_text(encoding="utf-8")
        if not self._pass(path, source, tests, lambda known: known.seconds < QUICK_S):
            raise ValueError(f"{' '.join(tests)} fail in a forked process with {path} as it is")

    def _pass(self, path: str, source: str, tests: tuple[str, ...], which: Callable[[Known], bool]) -> bool:
        chosen = {name: known.seconds for name, known in self.known[tests].items() if which(known)}
        files = tuple(sorted({name.split("::")[0] for name in chosen}))
        limit = LIMIT_S + 10 * sum(chosen.values())
        with _replaced(self.directory / PACKAGE / path, source):
            return not chosen or self._forked(files, f"{PACKAGE}/{path}", Chooser(chosen), limit)

    def _forked(self, tests: tuple[str, ...], changed: str | None, plugin: object, limit_s: float) -> bool:
        """Whether the tests pass within the limit, in a process of their own and with what it starts ended after it."""
        forgotten = importers(self.directory, changed) if changed else set()
        child = os.fork()
        if not child:
            os.setsid()
            os._exit(_run(forgotten, tests, plugin))
        end, status = time.monotonic() + limit_s, 1
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if not done:
            os.waitpid(child, 0)
            print(f"ended after {limit_s:.0f} s", file=sys.stderr)
        return bool(done) and status == 0


def _run(forgotten: set[str], tests: tuple[str, ...], plugin: object) -> int:
    """In the forked process: the tests against modules imported anew."""
    for name in [name for name in sys.modules if name in forgotten or name.split(".")[0] == "tests"]:
        module = sys.modules.pop(name)
        parent, _, own = name.rpartition(".")
        if getattr(sys.modules.get(parent), own, None) is module:
            delattr(sys.modules[parent], own)
    if not os.environ.get("MUTANTS_SHOW"):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    # Ranks of the tests come from this process, which has imported what they need, not from a server that would import it anew.
    context = multiprocessing.get_context
    multiprocessing.get_context = lambda name=None: context("fork" if name == "forkserver" else name)  # type: ignore[assignment]
    options = [
        "-x",
        "-q",
        "-m",
        "not soak",
        "--assert=plain",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:unraisableexception",
    ]
    return int(pytest.main([*options, *tests], plugins=[plugin]))


@contextlib.contextmanager
def _replaced(path: Path, text: str) -> Iterator[None]:
    original = path.read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(original, encoding="utf-8")


def function_at(file: Path, line: int) -> int | None:
    """First line of the innermost function whose body holds the line; None where the line runs at import."""
    found = None
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        body = node.body if isinstance(node.body, list) else [node.body]
        if body[0].lineno <= line <= (node.end_lineno or 0):
            # a code object begins with its decorators
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            found = max(found or 0, first)
    return found


def importers(directory: Path, changed: str) -> set[str]:
    """Names of the imported modules of the package that the file `changed` is, or that import it, if only through others."""
    files = {
        name: Path(file)
        for name, module in sys.modules.items()
        if name.split(".")[0] == PACKAGE and (file := getattr(module, "__file__", None))
    }
    start = next((name for name, file in files.items() if file == directory / changed), None)
    found = set() if start is None else {start}
    imports = {name: _imports(file) | {name.rpartition(".")[0]} for name, file in files.items()}
    while more := {name for name, used in imports.items() if used & found} - found:
        found |= more
    return found


def _imports(file: Path) -> set[str]:
    """Modules that a file may import, with names that are no modules among them."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


class Learner:
    """A plugin of pytest that notes how long each test lasts, and which functions of the package it enters."""

    def __init__(self, directory: Path, notes: Path) -> None:
        self.directory, self.notes = directory, notes
        self.inside = f"{directory / PACKAGE}{os.sep}"
        self.entered, self.shared = set[str](), set[str]()  # by this test; by fixtures of several tests
        self.places: dict[CodeType, str] = {}
        self.learned: dict[str, tuple[float, list[str] | None]] = {}

    def pytest_runtest_protocol(self, item: Any) -> None:
        self.entered = set()
        self.started = time.monotonic()
        threading.settrace(self._enter)
        sys.settrace(self._enter)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        before, self.entered = self.entered, set()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                self.shared |= self.entered
            self.entered |= before

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        sys.settrace(None)
        entered = None if ELSEWHERE in self.entered else sorted(self.entered)
        self.learned[nodeid] = time.monotonic() - self.started, entered

    def pytest_sessionfinish(self) -> None:
        learned = {
            name: (seconds, None if entered is None else sorted({*entered, *self.shared}))
            for name, (seconds, entered) in self.learned.items()
        }
        modules = [name for name in sys.modules if name.split(".")[0] not in (PACKAGE, "tests")]
        self.notes.write_text(json.dumps({"tests": learned, "modules": modules}), encoding="utf-8")

    def _enter(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        place = self.places.get(code)  # of every call of any function: it has to be quick
        if place is None:
            place = self.places[code] = self._place(code)
        if place:
            self.entered.add(place)

    def _place(self, code: CodeType) -> str:
        """`path:line` of a function of the package, ELSEWHERE of one that leads to other processes, else nothing."""
        if code.co_filename.startswith(self.inside):
            path = Path(code.co_filename).relative_to(self.directory).as_posix()
            return f"{path}:{code.co_firstlineno}"
        return ELSEWHERE if code.co_filename.endswith(STARTERS) else ""


class Chooser:
    """A plugin of pytest that runs some tests, the fastest first, and ends the process at one that calculates for too long."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        left = [item for item in items if item.nodeid not in self.seconds]
        items[:] = sorted(
            (item for item in items if item.nodeid in self.seconds), key=lambda i: self.seconds[i.nodeid]
        )
        config.hook.pytest_deselected(items=left)

    def pytest_runtest_protocol(self, item: Any) -> None:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
        signal.setitimer(signal.ITIMER_PROF, PATIENCE_S + 10 * self.seconds[item.nodeid])
