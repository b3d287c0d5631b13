"""From a site and an allocation to the exact files of a job, in the run's own directory."""

import os
import re
import shlex
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gtpo_megatron.cluster.record import JOB, SERVERS, SERVERS_JOB, SUBMISSIONS
from gtpo_megatron.cluster.site import Site
from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import UserError

SCRIPTS = Path(__file__).parents[2] / "slurm"
SCRIPT, SERVE, LIBRARY, RECIPE, SITE = "train.sbatch", "serve.sbatch", "lib.sh", "recipe.yaml", "site.yaml"
AFTERWARDS = ("convert.sbatch", "evaluate.sbatch")  # for a person to submit, e.g. by a dependency
ARRAY = "array.sbatch"  # of the runs of a sweep
REPORT = "scaling.sbatch"  # of the runs of a scaling study
OPTIONS_MARK = "# --- options of the cluster ---\n"
FACTS_MARK = "# --- facts of the cluster and of this run ---\n"
Options = Callable[["Job", Site], Iterator[str]]


@dataclass(frozen=True)
class Job:
    """What is asked of Slurm for one run. Paths are absolute."""

    name: str
    run: Path  # the run's directory
    folder: Path  # where the job starts: what the recipe's paths are relative to
    nodes: int  # that train
    ranks_per_node: int
    gpus_per_node: int
    time: str
    retries: int
    python: str
    servers: int = 0  # nodes of this job that serve
    het: bool = False  # those as a second component of a heterogeneous job
    servers_jobs: int = 0  # jobs of one node each that serve
    spares: int = 0  # more nodes of this job, for those that are unfit

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def of_run(shape: Job, config: RunConfig) -> Job:
    """A job of this shape for the run of `config`."""
    return replace(shape, name=config.name, run=Path(os.path.abspath(config.path)))


def servers_settings(job: Job, tensor: int, servers: int) -> list[str]:
    """What the recipe of a run with servers of ours says of them, as key=value.

    Args:
        tensor: rollout.sglang.tensor.
        servers: rollout.sglang.servers; where it is 1, as many as a node's GPUs allow.

    Raises:
        UserError: a server is larger than a node.
    """
    if job.gpus_per_node and tensor > job.gpus_per_node:
        raise UserError(
            f"rollout.sglang.tensor: {tensor}, but a node has {job.gpus_per_node} GPUs: a server is on one node"
        )
    number = max(servers, job.gpus_per_node // tensor) if servers == 1 else servers
    return [f"rollout.sglang.urls_dir={job.run / SERVERS}", f"rollout.sglang.servers={number}"]


def options(job: Job, site: Site) -> Iterator[str]:
    """The options of sbatch, those of the site last; then those of the servers' component, where there is one."""
    yield f"--job-name={job.name}"
    yield f"--nodes={job.nodes + job.spares + (0 if job.het else job.servers)}"
    yield f"--ntasks-per-node={job.ranks_per_node}"
    if job.gpus_per_node:
        yield f"--gpus-per-node={job.gpus_per_node}"
    if site.cpus_per_rank:
        yield f"--cpus-per-task={site.cpus_per_rank}"
    yield f"--signal=USR1@{site.stop_before_s}"
    yield from _options_of_all(job, site)
    if job.het:
        yield "hetjob"
        yield f"--job-name={job.name}"
        yield "--requeue"
        yield "--ntasks-per-node=1"
        yield from _options_of_serving_nodes(job, site, job.servers)


def servers_options(job: Job, site: Site) -> Iterator[str]:
    """The same for the jobs of servers: an array, each of one node, which come and go by themselves."""
    yield f"--job-name={job.name}-serve"
    yield f"--array=1-{job.servers_jobs}"
    yield from _options_of_serving_nodes(job, site, 1)


def _options_of_serving_nodes(job: Job, site: Site, nodes: int) -> Iterator[str]:
    yield f"--nodes={nodes}"
    if job.gpus_per_node:
        yield f"--gpus-per-node={job.gpus_per_node}"
    if site.cpus_per_rank:
        yield f"--cpus-per-task={site.cpus_per_rank * job.ranks_per_node}"
    yield from _options_of_all(job, site)
    yield from site.sbatch_servers


def array_options(job: Job, site: Site, runs: int, at_once: int | None) -> Iterator[str]:
    """The same for a sweep: an array of so many jobs, each as `job` is, of which no more than `at_once` run at a time."""
    yield from options(job, site)
    yield f"--array=0-{runs - 1}{f'%{at_once}' if at_once else ''}"
    yield f"--output={job.run}/slurm-%A_%a.log"


def command_options(job: Job, site: Site) -> Iterator[str]:
    """The same for a command of one rank on one node."""
    yield f"--job-name={job.name}"
    yield "--nodes=1"
    yield "--ntasks-per-node=1"
    if job.gpus_per_node:
        yield "--gpus-per-node=1"
    if site.cpus_per_rank:
        yield f"--cpus-per-task={site.cpus_per_rank}"
    yield from _options_of_all(job, site)


def _options_of_all(job: Job, site: Site) -> Iterator[str]:
    yield f"--time={job.time}"
    for name in ("account", "partition", "qos"):
        if value := getattr(site, name):
            yield f"--{name}={value}"
    yield f"--chdir={job.folder}"
    yield f"--output={job.run}/slurm-%j.log"
    yield from site.sbatch


def facts(job: Job, site: Site, submission: Path) -> Iterator[str]:
    """Lines of bash: what the sbatch files leave to be said."""
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
    yield f"hung_after={site.hung_after_s}"
    yield f"screening={site.screening_s}"
    yield f"spares={job.spares}"
    yield f"servers={'jobs' if job.servers_jobs else 'component' if job.het else job.servers}"
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
    yield f'set -- {shlex.quote(str(job.run))} {shlex.quote(str(submission / RECIPE))} "$@"'


def script(job: Job, site: Site, submission: Path, template: str, asked_of_slurm: Options = options) -> str:
    """The sbatch file: `template` with the options and facts in their places."""
    asked = "".join(f"#SBATCH {option}\n" for option in asked_of_slurm(job, site))
    known = "".join(f"{line}\n" for line in facts(job, site, submission))
    return _fill(template, asked, known)


def _fill(template: str, asked: str, known: str) -> str:
    for mark in (OPTIONS_MARK, FACTS_MARK):
        if template.count(mark) != 1:
            raise UserError(f"{SCRIPTS}: in an sbatch file the line '{mark.strip()}' must be there, once")
    return template.replace(OPTIONS_MARK, OPTIONS_MARK + asked).replace(FACTS_MARK, FACTS_MARK + known)


def write(job: Job, site: Site, recipe: str, afterwards: Sequence[str] = AFTERWARDS) -> Path:
    """Write the files of a submission into <run>/submissions/<number>, which appears whole and checked; that folder.

    Args:
        recipe: the resolved configuration, as YAML.
        afterwards: sbatch files of commands that follow the run, written beside its own.

    Raises:
        UserError: the project's slurm/ is not beside the package, a folder that the job needs is not in its container, the
            time limit leaves no time to train, or Slurm refuses the job.
    """
    limit = seconds_of(job.time)
    if limit is not None and limit <= site.stop_before_s:
        raise UserError(
            f"--time {job.time}: {limit} s, and a run is asked to save and stop {site.stop_before_s} s before the limit "
            "(stop_before_s of the site): it would never train; give it more time"
        )
    for what, path in (("the run's directory", job.run), ("this folder", job.folder)):
        if not site.container.holds(path):
            raise UserError(
                f"container.mounts: {what}, {path}, is not in the container under that name; mount it or one above it"
            )

    def files(folder: Path) -> Iterator[tuple[str, str]]:
        for name, asked in scripts_of(job, afterwards).items():
            yield name, script(job, site, folder, _template(name), asked)
        yield LIBRARY, _template(LIBRARY)
        yield RECIPE, recipe
        yield SITE, site.model_dump_json(indent=1)

    return _write_whole(job.run / SUBMISSIONS, files)


def seconds_of(limit: str) -> int | None:
    """Of a time limit as sbatch takes it: minutes[:seconds], hours:minutes:seconds, or days-hours[:minutes[:seconds]].

    None for anything else, no limit among it: of that Slurm has an opinion of its own.
    """
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", limit):
        return None
    days, _, rest = limit.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    if not days and len(numbers) < 3:
        numbers = [0, *numbers]
    hours, minutes, seconds = (numbers + [0, 0])[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def write_array(job: Job, site: Site, runs: Sequence[Path], at_once: int | None) -> Path:
    """The same for a job array, each element of which runs the train.sbatch of one of the folders `runs`."""

    def files(_: Path) -> Iterator[tuple[str, str]]:
        asked = "".join(f"#SBATCH {option}\n" for option in array_options(job, site, len(runs), at_once))
        known = f"{_array('scripts', [str(run / SCRIPT) for run in runs])}\n"
        yield ARRAY, _fill(_template(ARRAY), asked, known)

    return _write_whole(job.run / SUBMISSIONS, files)


def _write_whole(parent: Path, files: Callable[[Path], Iterator[tuple[str, str]]]) -> Path:
    """A new folder 1, 2, ... in `parent`, with the files (name, text) that `files` gives for it; scripts are checked."""
    if not (SCRIPTS / SCRIPT).is_file():
        raise UserError(f"{SCRIPTS / SCRIPT}: not there; submit from a clone of the project (pip install -e)")
    partial = parent / f".{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir(parents=True)
    try:
        number = 1 + max((int(path.name) for path in parent.iterdir() if path.name.isdigit()), default=0)
        folder = parent / str(number)
        for name, text in files(folder):
            (partial / name).write_text(text, encoding="utf-8")
        for path in sorted(partial.glob("*.sbatch")):
            check(path)
        try:
            os.rename(partial, folder)
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}; is another submit of this run going on?") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _template(name: str) -> str:
    return (SCRIPTS / name).read_text(encoding="utf-8")


def scripts_of(job: Job, afterwards: Sequence[str] = AFTERWARDS) -> dict[str, Options]:
    """The sbatch files of a submission, and what each asks of Slurm."""
    servers = {SERVE: servers_options} if job.servers_jobs else {}
    return {SCRIPT: options} | servers | dict.fromkeys(afterwards, command_options)


def check(file: Path) -> None:
    """What can be known to be wrong before it is queued: bash's grammar, and Slurm's opinion where there is Slurm.

    Raises UserError.
    """
    _ask(["bash", "-n", str(file)])
    if shutil.which("sbatch"):
        _ask(["sbatch", "--test-only", str(file)])


def submit(folder: Path) -> list[str]:
    """Queue the jobs, and note their numbers beside the scripts. Raises UserError with what Slurm answers."""
    lines = commands(folder)
    if not shutil.which("sbatch"):
        raise UserError(f"no sbatch here; submit from a login node: {'; '.join(map(shlex.join, lines))}")
    queued = []
    for line, file in zip(lines, (JOB, SERVERS_JOB), strict=False):
        queued.append(_ask(line).partition(";")[0].strip())
        (folder / file).write_text(f"{queued[-1]}\n", encoding="utf-8")
    return queued


def submit_array(folder: Path, runs: Sequence[Path]) -> str:
    """Queue a job array, and note in the submission of each run which element is its; return the array's number."""
    (array,) = submit(folder)
    for index, run in enumerate(runs):
        (run / JOB).write_text(f"{array}_{index}\n", encoding="utf-8")
    return array


def submit_report(smallest: Path, jobs: Sequence[str], others: Sequence[Path]) -> str:
    """Queue the report of a scaling study behind its jobs; its number.

    `smallest` is the submission of the smallest run, `others` are the directories of the others. Should a run fail for good,
    Slurm drops the report.
    """
    when = [f"--dependency=afterok:{':'.join(jobs)}", "--kill-on-invalid-dep=yes"]
    return (
        _ask(["sbatch", "--parsable", *when, str(smallest / REPORT), *map(str, others)])
        .partition(";")[0]
        .strip()
    )


def commands(folder: Path) -> list[list[str]]:
    """The lines that queue the jobs: of the run or the array, and of servers if they have jobs of their own."""
    files = [folder / name for name in (SCRIPT, ARRAY, SERVE)]
    return [["sbatch", "--parsable", str(file)] for file in files if file.exists()]


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
