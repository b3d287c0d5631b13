"""Where the time of a run went, over all its jobs: from what it left in its directory, and nothing else."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gtpo_megatron.cluster.record import Start, read_starts, submitted
from gtpo_megatron.run.metrics import DISCARDED, Metric, read_metrics

_SECONDS = "seconds/"
_CLOCK_S = 10.0  # by which the clocks of nodes and of the file system may differ
# ends after which nothing is lost but what a later start is seen to repeat; at others a step was cut off
_ORDERLY = {None, "0", "2", "3", "term"}


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run by what they went into: together, from the first that is known of it to the last.

    None: nothing is known of it.
    """

    starts: int  # that slurm/ made and that left their times; 0 outside Slurm
    stages: Mapping[str, float]  # of the steps that count, by stage
    evaluation: float  # but that before the first step of a start
    between: float  # steps: checkpoints, the orderly end of a start
    starting: float | None  # until a start's first step begins
    repeated: float  # steps that were lost and made again, and what a failure cut off
    repeated_steps: int
    queue: float | None
    idle: float | None  # no job was submitted
    unknown: float  # from the last sign of life of a start whose end nobody saw to the next; queue or idle
    first_queue_known: bool

    @property
    def running(self) -> float:
        """Seconds in which the run had its nodes, as far as known."""
        return sum(
            (*self.stages.values(), self.evaluation, self.between, self.starting or 0.0, self.repeated)
        )

    @property
    def share(self) -> float:
        """Of the seconds in which the run had its nodes, those in steps that count."""
        return sum(self.stages.values()) / self.running if self.running else 0.0


@dataclass(frozen=True)
class _Line:
    """A line of metrics; without seconds it is an evaluation's."""

    time: float  # at its end
    seconds: Mapping[str, float]
    discarded: bool

    @property
    def length(self) -> float:
        return sum(self.seconds.values())


def read_goodput(run: Path, rows: Iterable[Mapping[str, Metric]]) -> Goodput:
    """The goodput of the run in the directory `run`, whose metrics are `rows`.

    Raises:
        UserError: the file of discarded metrics is damaged.
    """
    discarded = read_metrics(run / DISCARDED) if (run / DISCARDED).exists() else []
    return account(rows, discarded, read_starts(run), submitted(run))


def account(
    rows: Iterable[Mapping[str, Metric]],
    discarded: Iterable[Mapping[str, Metric]],
    starts: Sequence[Start],
    submitted: Mapping[str, float],
) -> Goodput:
    """Split the time of a run.

    Args:
        rows: lines of metrics.jsonl.
        discarded: lines of steps that were lost; one may be there more than once.
        starts: by slurm/, in the order of their begin.
        submitted: when each job was, in seconds since the epoch; those that are not known are left out.
    """
    once = {(row["step"], row.get("time")): row for row in discarded}
    dropped = list(_lines(once.values(), discarded=True))
    lines = sorted([*_lines(rows, discarded=False), *dropped], key=lambda line: line.time)
    ledger: defaultdict[str, float] = defaultdict(float)
    stages: defaultdict[str, float] = defaultdict(float)
    previous, end = None, None
    for start, own in _by_start(lines, starts):
        if start is not None:
            if end is not None and start.ended is not None and start.ended <= end:
                continue  # refused, while another held the run
            _wait(ledger, previous, end, start, submitted.get(start.job_id))
        end = max(_spend(ledger, stages, start, own), end or 0.0)
        previous = start
    first = starts[0] if starts else None
    return Goodput(
        starts=len(starts),
        stages=dict(stages),
        evaluation=ledger["evaluation"],
        between=ledger["between"],
        starting=ledger["starting"] if starts else None,
        repeated=ledger["repeated"],
        repeated_steps=sum(bool(line.seconds) for line in dropped),
        queue=ledger.get("queue"),
        idle=ledger.get("idle"),
        unknown=ledger["unknown"],
        first_queue_known=first is not None and _known(first, submitted.get(first.job_id)),
    )


def goodput_rows(goodput: Goodput) -> list[tuple[str, str, str]]:
    """What the time went into, seconds, share of all that is known: the lines of a table."""
    redone = f"{goodput.repeated_steps} step{'' if goodput.repeated_steps == 1 else 's'}"
    kinds = [
        *((f"steps: {name}", seconds) for name, seconds in goodput.stages.items()),
        ("evaluation", goodput.evaluation),
        ("between steps: checkpoints, ends", goodput.between),
        ("starting", goodput.starting),
        (f"repeated work: {redone}, and what failures cut off", goodput.repeated),
        ("queue", goodput.queue),
        ("no job submitted", goodput.idle),
        ("queue, no job, or a start whose end nobody saw", goodput.unknown),
    ]
    total = sum(seconds or 0.0 for _, seconds in kinds) or 1.0
    return [
        (name, "not known", "") if seconds is None else (name, f"{seconds:.1f}", f"{seconds / total:.1%}")
        for name, seconds in kinds
        if seconds != 0.0
    ]


def goodput_notes(goodput: Goodput) -> str:
    """What the table says in a sentence, and what is not known, for want of what a run outside Slurm does not leave."""
    if not goodput.starts:
        return (
            f"{goodput.share:.0%} of the time from its first step to its last went into steps that count. It was not "
            "started by the files in slurm/: there is no queue, when it started is not known, and pauses and later "
            "starts are part of what lies between steps."
        )
    count = f"{goodput.starts} start{'' if goodput.starts == 1 else 's'}"
    first = "" if goodput.first_queue_known else " How long its first job waited in the queue is not known."
    return f"{goodput.share:.0%} of the time in which the run had its nodes ({count}) went into steps that count.{first}"


def _lines(rows: Iterable[Mapping[str, Metric]], discarded: bool) -> Iterator[_Line]:
    for row in rows:
        seconds = {
            name.removeprefix(_SECONDS): float(value)
            for name, value in row.items()
            if name.startswith(_SECONDS) and isinstance(value, int | float)
        }
        if isinstance(row.get("time"), int | float):
            yield _Line(float(row["time"]), seconds, discarded)


def _by_start(lines: Sequence[_Line], starts: Sequence[Start]) -> list[tuple[Start | None, list[_Line]]]:
    """Each start with its lines; first, with None, those of no start that is known, if there are any."""
    outside: list[_Line] = []
    own: list[list[_Line]] = [[] for _ in starts]
    for line in lines:
        before = [i for i, start in enumerate(starts) if start.began <= line.time]
        during = [i for i in before if (ended := starts[i].ended) is None or line.time <= ended]
        chosen = during or before  # the clock of another node may be late
        (own[chosen[-1]] if chosen else outside).append(line)
    first: list[tuple[Start | None, list[_Line]]] = [(None, outside)] if outside else []
    return [*first, *zip(starts, own, strict=True)]


def _known(start: Start, submitted: float | None) -> bool:
    """Whether the time of a job's submission is one; that of a file that was copied is not."""
    return submitted is not None and submitted <= start.began + _CLOCK_S


def _wait(
    ledger: defaultdict[str, float],
    previous: Start | None,
    end: float | None,
    start: Start,
    submitted: float | None,
) -> None:
    """Enter the time from the end of the start before, if there is one, to the begin of this one."""
    if end is None:
        if submitted is not None and _known(start, submitted):
            ledger["queue"] += max(0.0, start.began - submitted)
        return
    wait = max(0.0, start.began - end)
    if previous is None or previous.ended is None or "none" in (previous.job_id, start.job_id):
        ledger["unknown"] += wait
    elif previous.job_id == start.job_id:  # requeued
        ledger["queue"] += wait
    elif submitted is not None and _known(start, submitted):
        idle = min(wait, max(0.0, submitted - end))
        ledger["idle"] += idle
        ledger["queue"] += wait - idle
    else:
        ledger["unknown"] += wait


def _spend(
    ledger: defaultdict[str, float],
    stages: defaultdict[str, float],
    start: Start | None,
    lines: Sequence[_Line],
) -> float:
    """Enter the time of one start, and return when it ended, as far as known."""
    now = lines[0].time - lines[0].length if start is None else start.began
    begun = start is None  # its first step
    for line in lines:
        before = max(0.0, line.time - line.length - now)  # the line's own seconds
        if not begun:
            ledger["starting"] += before
        elif line.discarded:
            ledger["repeated"] += before
        else:
            ledger["between" if line.seconds else "evaluation"] += before
        if line.discarded:
            ledger["repeated"] += line.length
        else:
            for name, seconds in line.seconds.items():
                stages[name] += seconds
        begun = begun or bool(line.seconds)
        now = max(now, line.time)
    if start is None or start.ended is None:
        return now
    kind = "starting" if not begun else "between" if start.how in _ORDERLY else "repeated"
    ledger[kind] += max(0.0, start.ended - now)
    return max(now, start.ended)
