"""From a site and an allocation to the exact files of a job, in the run's own directory."""

import os
import shlex
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gtpo_megatron.cluster.record import JOB, SUBMISSIONS
from gtpo_megatron.cluster.site import Site
from gtpo_megatron.errors import UserError

SCRIPTS = Path(__file__).parents[2] / "slurm"
SCRIPT, LIBRARY, RECIPE, SITE = "train.sbatch", "lib.sh", "recipe.yaml", "site.yaml"
OPTIONS_MARK = "# --- options of the cluster ---\n"
FACTS_MARK = "# --- facts of the cluster and of this run ---\n"


@dataclass(frozen=True)
class Job:
    """What is asked of Slurm for one run. Paths are absolute."""

    name: str
    run: Path  # the run's directory
    folder: Path  # where the job starts: what the recipe's paths are relative to
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    time: str
    retries: int
    python: str

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def options(job: Job, site: Site) -> Iterator[str]:
    """The options of sbatch, those of the site last."""
    yield f"--job-name={job.name}"
    yield f"--nodes={job.nodes}"
    yield f"--ntasks-per-node={job.ranks_per_node}"
    if job.gpus_per_node:
        yield f"--gpus-per-node={job.gpus_per_node}"
    if site.cpus_per_rank:
        yield f"--cpus-per-task={site.cpus_per_rank}"
    yield f"--time={job.time}"
    for name in ("account", "partition", "qos"):
        if value := getattr(site, name):
            yield f"--{name}={value}"
    yield f"--signal=USR1@{site.stop_before_s}"
    yield f"--chdir={job.folder}"
    yield f"--output={job.run}/slurm-%j.log"
    yield from site.sbatch


def facts(job: Job, site: Site, submission: Path) -> Iterator[str]:
    """Lines of bash: what train.sbatch leaves to be said."""
    container = site.container
    mounts = ",".join(container.mounts)
    srun_options: list[str] = []
    in_container: list[str] = []
    if container.kind == "pyxis":
        srun_options = [f"--container-image={container.image}", f"--container-workdir={job.folder}"]
        srun_options += [f"--container-mounts={_mounts_of_pyxis(container.mounts)}"] if mounts else []
    elif container.kind == "apptainer":
        in_container = ["apptainer", "exec", *(["--nv"] if job.gpus_per_node else [])]
        in_container += [*(["--bind", mounts] if mounts else []), "--pwd", str(job.folder), container.image]
    yield f"lib={shlex.quote(str(submission / LIBRARY))}"
    yield f"retries={job.retries}"
    yield _array("modules", site.modules)
    yield _array("python", [job.python])
    yield _array("srun_options", srun_options)
    yield _array("in_container", in_container)
    yield _array("needed", [container.image] if (container.image or "").startswith("/") else [])
    variables = {}
    if site.interface:
        variables = {"NCCL_SOCKET_IFNAME": site.interface, "GLOO_SOCKET_IFNAME": site.interface}
    for name, value in (variables | site.env).items():
        yield f"export {name}={shlex.quote(value)}"
    yield f"set -- {shlex.quote(str(job.run))} {shlex.quote(str(submission / RECIPE))}"


def script(job: Job, site: Site, submission: Path, template: str) -> str:
    """The sbatch file: `template` with the options and facts in their places."""
    for mark in (OPTIONS_MARK, FACTS_MARK):
        if template.count(mark) != 1:
            raise UserError(f"{SCRIPTS / SCRIPT}: the line '{mark.strip()}' must be there, once")
    asked = "".join(f"#SBATCH {option}\n" for option in options(job, site))
    known = "".join(f"{line}\n" for line in facts(job, site, submission))
    return template.replace(OPTIONS_MARK, OPTIONS_MARK + asked).replace(FACTS_MARK, FACTS_MARK + known)


def write(job: Job, site: Site, recipe: str) -> Path:
    """Write the files of a submission into <run>/submissions/<number>, which appears whole and checked; that folder.

    Args:
        recipe: the resolved configuration, as YAML.

    Raises:
        UserError: the project's slurm/ is not beside the package, a folder that the job needs is not in its container, or
            Slurm refuses the job.
    """
    if not (SCRIPTS / SCRIPT).is_file():
        raise UserError(f"{SCRIPTS / SCRIPT}: not there; submit from a clone of the project (pip install -e)")
    for what, path in (("the run's directory", job.run), ("this folder", job.folder)):
        if not site.container.holds(path):
            raise UserError(
                f"container.mounts: {what}, {path}, is not in the container under that name; mount it or one above it"
            )
    parent = job.run / SUBMISSIONS
    partial = parent / f".{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir(parents=True)
    try:
        number = 1 + max((int(path.name) for path in parent.iterdir() if path.name.isdigit()), default=0)
        folder = parent / str(number)
        template = (SCRIPTS / SCRIPT).read_text(encoding="utf-8")
        (partial / SCRIPT).write_text(script(job, site, folder, template), encoding="utf-8")
        shutil.copyfile(SCRIPTS / LIBRARY, partial / LIBRARY)
        (partial / RECIPE).write_text(recipe, encoding="utf-8")
        (partial / SITE).write_text(site.model_dump_json(indent=1), encoding="utf-8")
        check(partial / SCRIPT)
        try:
            os.rename(partial, folder)
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}; is another submit of this run going on?") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def check(file: Path) -> None:
    """What can be known to be wrong before it is queued: bash's grammar, and Slurm's opinion where there is Slurm.

    Raises UserError.
    """
    _ask(["bash", "-n", str(file)])
    if shutil.which("sbatch"):
        _ask(["sbatch", "--test-only", str(file)])


def submit(folder: Path) -> str:
    """Queue the job, and note its number beside the script. Raises UserError with what Slurm answers."""
    if not shutil.which("sbatch"):
        raise UserError(f"no sbatch here; submit from a login node: {' '.join(command(folder))}")
    job_id = _ask(command(folder)).partition(";")[0].strip()
    (folder / JOB).write_text(f"{job_id}\n", encoding="utf-8")
    return job_id


def command(folder: Path) -> list[str]:
    """The line that queues the job."""
    return ["sbatch", "--parsable", str(folder / SCRIPT)]


def _mounts_of_pyxis(mounts: Sequence[str]) -> str:
    return ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)


def _array(name: str, words: Sequence[str]) -> str:
    return f"{name}=({' '.join(map(shlex.quote, words))})"


def _ask(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        answer = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"{' '.join(words)}: {answer or f'exit code {done.returncode}'}")
    return done.stdout
