"""The progress display, in a terminal and outside one."""

import io
import re
import time

from rich.console import Console

from gtpo_megatron.run.progress import RunProgress


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def test_outside_a_terminal_every_step_is_a_line() -> None:
    out = console(terminal=False)
    with RunProgress(4, console=out, first_step=1) as progress:
        with progress.stage("rollout"):
            progress.note("resumed [from] step 1")
        progress.step(2, {"reward/mean": 1.25, "entropy/mean": 0.5, "tokens_per_second": 812.4, "lr": 1.0})
        progress.step(4, {"loss": None})
    lines = out.file.getvalue().splitlines()
    assert lines[0] == "resumed [from] step 1"
    assert lines[1].startswith("step 2/4  reward 1.250  entropy 0.500  tok/s 812  left 0:00:")
    assert lines[2] == "step 4/4  left 0:00:00"
    assert len(lines) == 3


def test_outside_a_terminal_a_stage_that_lasts_is_named_with_what_it_waits_for() -> None:
    out = console(terminal=False)
    with RunProgress(4, console=out, every_s=0.1) as progress:
        progress.waits_for = lambda: "http://host:1: down, connection refused"
        with progress.stage("rollout"):
            while len(out.file.getvalue().splitlines()) < 2:
                time.sleep(0.01)
    for line in out.file.getvalue().splitlines()[:2]:
        assert re.fullmatch(
            r"(starting|rollout): 0 s; waits for http://host:1: down, connection refused", line
        )


def test_in_a_terminal_step_stage_and_figures_are_drawn() -> None:
    out = console(terminal=True)
    with RunProgress(4, console=out) as progress:
        progress.step(1, {"reward/mean": 1.25})
        with progress.stage("update"):
            progress._live.refresh()
    text = out.file.getvalue()
    assert "step 1/4" in text and "update 0 s" in text and "1.250" in text


def test_other_ranks_show_nothing() -> None:
    out = console(terminal=True)
    with RunProgress(4, mode="live", main_rank=False, console=out) as progress:
        progress.note("x")
        progress.step(1, {})
    assert out.file.getvalue() == ""
