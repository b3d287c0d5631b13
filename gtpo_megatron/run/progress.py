"""What a person sees while a run goes on: a live display in a terminal, a plain line per step, or long wait, elsewhere."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# (metric, label, format); those that a step has are shown
_SHOWN = (
    ("reward/mean", "reward", "{:.3f}"),
    ("loss", "loss", "{:.4g}"),
    ("entropy/mean", "entropy", "{:.3f}"),
    ("response/length_mean", "length", "{:.0f}"),
    ("grad_norm", "grad norm", "{:.3g}"),
    ("tokens_per_second", "tok/s", "{:.0f}"),
)


class RunProgress:
    """Shows step, stage, main metrics and the time left.

    Args:
        steps: of the whole run.
        mode: live redraws a few lines in place; plain prints a line per step; auto is live in a terminal.
        first_step: steps that were done before (a resumed run).
        main_rank: only one rank shows anything.
        console: where to; standard output by default.
        every_s: without a terminal, a stage that has lasted so long is named, and again each time it has gone on so long.
    """

    def __init__(
        self,
        steps: int,
        mode: Literal["auto", "live", "plain", "off"] = "auto",
        first_step: int = 0,
        main_rank: bool = True,
        console: Console | None = None,
        every_s: float = 30.0,
    ) -> None:
        self._console = console or Console()
        if mode == "auto":
            mode = "live" if self._console.is_terminal else "plain"
        self._mode = mode if main_rank else "off"
        self._steps = steps
        self._first = self._done = first_step
        self._stage = "starting"
        self._stage_started = self._started = time.monotonic()
        self._metrics: Mapping[str, Any] = {}
        self.waits_for: Callable[[], str] = lambda: (
            ""
        )  # what a stage that lasts waits for, where that is known
        self._every_s = every_s
        self._ended = threading.Event()
        self._waiting = threading.Thread(target=self._name_what_lasts, name="progress", daemon=True)
        self._live = Live(get_renderable=self._draw, console=self._console, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._mode == "live":
            self._live.start()
        elif self._mode == "plain":
            self._waiting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        self._ended.set()
        if self._mode == "plain":
            self._waiting.join()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Name what is being done: at once in the live display, elsewhere when it lasts."""
        outer, self._stage, self._stage_started = self._stage, name, time.monotonic()
        try:
            yield
        finally:
            self._stage, self._stage_started = outer, time.monotonic()

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show that `step` steps are done, with the metrics of the last."""
        self._done, self._metrics = step, metrics
        if self._mode == "plain":
            parts = [f"step {step}/{self._steps}", *(f"{label} {text}" for label, text in self._figures())]
            self._say("  ".join([*parts, f"left {self._left()}"]))

    def note(self, text: str) -> None:
        """A line that stays: an evaluation's result, a checkpoint, a warning."""
        if self._mode != "off":
            self._say(text)

    def _name_what_lasts(self) -> None:
        due = (
            self._stage_started,
            self._every_s,
        )  # the stage, by its start, and how long it lasts when it is named next
        while not self._ended.wait(min(1.0, self._every_s / 4)):
            started, seconds = self._stage_started, time.monotonic() - self._stage_started
            if started != due[0]:
                due = started, self._every_s
            if seconds >= due[1]:
                due = started, due[1] + self._every_s
                reason = self.waits_for()
                self.note(f"{self._stage}: {seconds:.0f} s" + (f"; waits for {reason}" if reason else ""))

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _figures(self) -> list[tuple[str, str]]:
        return [
            (label, pattern.format(float(self._metrics[name])))
            for name, label, pattern in _SHOWN
            if self._metrics.get(name) is not None
        ]

    def _left(self) -> str:
        """Time left at the pace of this process's steps, hours:minutes:seconds."""
        if self._done == self._first:
            return "-:--:--"
        pace = (time.monotonic() - self._started) / (self._done - self._first)
        seconds = math.ceil(pace * (self._steps - self._done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _draw(self) -> Group:
        header = Table.grid(padding=(0, 2))
        header.add_row(
            Text(f"step {self._done}/{self._steps}", style="bold"),
            ProgressBar(total=self._steps, completed=self._done, width=30),
            f"left {self._left()}",
            Text(f"{self._stage} {time.monotonic() - self._stage_started:.0f} s", style="cyan"),
        )
        figures = Text("  ").join(
            Text.assemble((f"{label} ", "dim"), text) for label, text in self._figures()
        )
        return Group(header, figures)
