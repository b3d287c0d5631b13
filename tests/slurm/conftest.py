"""One virtual cluster for all tests here, and small runs for it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gtpo_megatron.cluster.record import job_ids
from tests.sglang.conftest import sglang_python as sglang_python  # the fixture
from tests.slurm.runs import TRAIN, small_recipe, user_environment, virtual_site, write_yaml
from tests.slurm.virtual import CannotRun, VirtualSlurm, install


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualSlurm]:
    """Four nodes that are up. Where that is impossible the tests are skipped (a failure where CI=true, as any skip)."""
    try:
        install()
        slurm = VirtualSlurm(tmp_path_factory.mktemp("slurm"))
        slurm.__enter__()
    except CannotRun as reason:
        pytest.skip(str(reason))
    try:
        yield slurm
    finally:
        slurm.__exit__()


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    return user_environment()


@pytest.fixture(autouse=True)
def no_job_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test that fails leaves behind would fail the next."""
    if "cluster" not in request.fixturenames:
        yield
        return
    cluster: VirtualSlurm = request.getfixturevalue("cluster")
    yield
    if left := cluster.run("squeue", "--noheader", "--format=%A").stdout.split():
        cluster.run("scancel", *sorted(set(left)), check=False)  # some may have ended meanwhile
        cluster.wait_until_idle()


@pytest.fixture
def recipe(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> Path:
    return write_yaml(tmp_path / "recipe.yaml", small_recipe(tmp_path, "small", tiny_checkpoint("llama")))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return write_yaml(tmp_path / "site.yaml", virtual_site())


@pytest.fixture
def submit(
    cluster: VirtualSlurm, environment: dict[str, str], recipe: Path, site: Path
) -> Callable[..., str]:
    """Submit the recipe by the command line, on two nodes, under a name: the job's number."""

    def call(name: str, *words: str) -> str:
        command = (*TRAIN, "submit", recipe, "--site", site, "--nodes", "2", f"name={name}", *words)
        cluster.run(*command, environment=environment)
        return job_ids(recipe.parent / "runs" / name)[-1]

    return call
