"""Which rank this process is under Slurm, where `srun` starts the ranks. Elsewhere torchrun says it, and this does nothing.

srun is the launcher because torchrun cannot carry a job that must stop well: it turns a rank's exit code 3 into 1, dies of
SIGUSR1 and leaves its workers running, and kills them half a minute after SIGTERM.
"""

import itertools
import re
import signal
from collections.abc import Mapping, MutableMapping
from typing import Any

from gtpo_megatron.errors import STOPPED, UserError

PORTS = range(20000, 30000)  # below those that Linux hands out by itself
_GROUP = re.compile(r"\[([^\]]*)\]")
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def join_step(environ: MutableMapping[str, str]) -> None:
    """Make this process the rank that its Slurm step says it is; torch.distributed then reads it from `environ`.

    A step that is asked to stop (SIGUSR1, SIGTERM) ends with STOPPED instead of dying of the signal; a run handles both itself.
    """
    environ.update(world_of_step(environ))
    if in_step(environ):
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, _stop)


def in_step(environ: Mapping[str, str]) -> bool:
    """Whether srun has started this process."""
    return "SLURM_STEP_ID" in environ and "SLURM_STEP_NUM_TASKS" in environ


def world_of_step(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task that srun started.

    Empty outside a step, in a step of one task, and where torchrun has started this process. Only the variables of the step
    count: a batch script's own shell has a SLURM_PROCID and the job's SLURM_NTASKS as well, and is no rank of anything.
    MASTER_ADDR and MASTER_PORT that are set already are kept.

    Raises:
        UserError: the step has several tasks, and its variables or those of a launcher contradict it. Going on would make
            as many runs of one rank, all in one directory.
    """
    if not in_step(environ) or "TORCHELASTIC_RUN_ID" in environ:
        return {}
    size = _number(environ, "SLURM_STEP_NUM_TASKS", 1, None)
    if size == 1:
        return {}
    rank = _number(environ, "SLURM_PROCID", 0, size)
    nodes = hosts(_text(environ, "SLURM_STEP_NODELIST"))
    tasks = tasks_per_node(_text(environ, "SLURM_STEP_TASKS_PER_NODE"))
    if len(tasks) != len(nodes) or sum(tasks) != size:
        raise UserError(
            f"Slurm: SLURM_STEP_NUM_TASKS={size}, but SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']} on "
            f"SLURM_STEP_NODELIST={environ['SLURM_STEP_NODELIST']}; start the ranks by one srun of this job"
        )
    local_size = tasks[_number(environ, "SLURM_NODEID", 0, len(nodes))]
    world = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": _number(environ, "SLURM_LOCALID", 0, local_size),
        "LOCAL_WORLD_SIZE": local_size,
    }
    for name, value in world.items():
        if environ.get(name, str(value)) != str(value):
            raise UserError(
                f"{name}={environ[name]} is set, but this is {name} {value} of a Slurm step of {size} tasks; remove {name} "
                "from the script that calls srun: this program takes it from Slurm"
            )
    port = PORTS[(7 * int(_text(environ, "SLURM_JOB_ID")) + int(environ["SLURM_STEP_ID"])) % len(PORTS)]
    master = {"MASTER_ADDR": nodes[0], "MASTER_PORT": str(port)}
    return {name: str(value) for name, value in world.items()} | {
        name: environ.get(name, value) for name, value in master.items()
    }


def hosts(nodelist: str) -> list[str]:
    """Slurm's short form of a list of hosts, written out: "gpu[08-10,12],login" -> gpu08 gpu09 gpu10 gpu12 login."""
    return [
        "".join(parts)
        for term in re.split(r",(?![^\[]*\])", nodelist)
        for parts in itertools.product(*map(_choices, enumerate(_GROUP.split(term))))
    ]


def tasks_per_node(counts: str) -> list[int]:
    """Slurm's short form of counts, written out: "2(x3),1" -> [2, 2, 2, 1]."""
    found = [_TASKS.fullmatch(count) for count in counts.split(",")]
    if not all(found):
        raise UserError(f"Slurm: SLURM_STEP_TASKS_PER_NODE={counts}: counts like 8(x4),2 are expected")
    return [int(match[1]) for match in found for _ in range(int(match[2] or 1))]


def _choices(part: tuple[int, str]) -> list[str]:
    """What a part of a term stands for: every second one is the inside of brackets."""
    index, text = part
    if index % 2 == 0:
        return [text]
    numbers = []
    for span in text.split(","):
        first, _, last = span.partition("-")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return numbers


def _text(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise UserError(
            f"Slurm: this is one of {environ['SLURM_STEP_NUM_TASKS']} tasks of a step, but {name} is not set, so its rank is "
            "not known; start the ranks by srun, and let its environment through (no --export=NONE, no --cleanenv)"
        )
    return environ[name]


def _number(environ: Mapping[str, str], name: str, least: int, end: int | None) -> int:
    text = _text(environ, name)
    if not text.isdigit() or int(text) < least or (end is not None and int(text) >= end):
        limit = f"from {least} to {end - 1}" if end is not None else f"of {least} or more"
        raise UserError(f"Slurm: {name}={text}: a number {limit} is expected in this step")
    return int(text)


def _stop(number: int, _: Any) -> None:
    raise SystemExit(STOPPED)
