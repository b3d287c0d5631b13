"""Fixtures of the whole test suite."""

import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from gtpo_megatron.commands.imports import importing
from tests.parallel.pool import DetachedPool, RankPool

# What a machine of continuous integration may lack; a skip for any other reason fails there (CI=true).
MAY_BE_MISSING = ("gpu",)


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which is a failure where CI=true: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not any(item.get_closest_marker(name) for name in MAY_BE_MISSING):
        _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    with importing():
        return (yield)


# Rooms whose tests share a costly thing: each runs in one process (pytest-xdist). Other tests are dealt out file by file. What
# takes longest comes first: a room that one process begins last is what the others wait for.
ROOMS = ("sglang", "te")
LONGEST_FIRST = ("sglang", "slurm", "te")
TESTS = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--layers",
        choices=("auto", "transformer_engine"),
        default="auto",
        help="of the policies on gloo ranks; transformer_engine: its Python over stand-ins of its kernels, and the tests that "
        "build such policies alone",
    )


def _keep_those_of_the_layers(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --layers=transformer_engine: tests on gloo ranks, but those that are marked `local_layers`, with the reason."""
    if config.getoption("--layers") == "auto":
        return

    def on_ranks(item: pytest.Item) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return "ranks" in getattr(item, "fixturenames", ()) and "ranks" not in parameters

    kept = [item for item in items if on_ranks(item) and not item.get_closest_marker("local_layers")]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _room(path: str) -> str:
    """The folder of tests/ that a test's path, relative to the project or not, lies in; "" for none."""
    folders = Path(path).parts
    below = folders[folders.index(TESTS.name) + 1 : -1] if TESTS.name in folders else ()
    return below[0] if below else ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The order of tests where several processes take them."""
    _keep_those_of_the_layers(config, items)
    if config.pluginmanager.hasplugin("xdist"):
        places = {room: place for place, room in enumerate(LONGEST_FIRST)}
        items.sort(key=lambda item: places.get(_room(str(item.path)), len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """What stays together: a room of ROOMS, else a file.

    Not by xdist's own groups: version 3.8 hands them on in a private name that pytest 9.2 does not have any more, and then
    deals out test by test without a word.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByRoom(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return room if (room := _room(file)) in ROOMS else file

    return ByRoom(config, log)


@pytest.fixture(scope="session")
def te_ranks() -> Iterator[DetachedPool]:
    """Gloo ranks whose policies are of Transformer Engine's layers, over stand-ins of its kernels."""
    subprocess.run([TESTS.parent / "tools" / "setup_te_standin.sh", sys.executable], check=True)
    pool = DetachedPool("tests.te.imported", TESTS.parent / ".build" / "te")
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest) -> Iterator[RankPool | DetachedPool]:
    """Gloo ranks in long-lived worker processes; see RankPool.run."""
    if request.config.getoption("--layers") == "transformer_engine":
        yield request.getfixturevalue("te_ranks")
        return
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Factory of small Hugging Face checkpoints by family, made once per session."""
    from tests.tiny_models import make_tiny_checkpoint

    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny_checkpoint(tmp_path_factory.mktemp(family), family)
        return made[family]

    return make
