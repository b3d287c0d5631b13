"""The line for whoever waits."""

import re
import time

from gtpo_megatron.evaluation.ticker import Ticker


def test_what_lasts_is_said_again_and_again_and_what_ended_is_not() -> None:
    lines: list[str] = []
    done = 0
    with Ticker(lines.append, every_s=0.02) as ticker:
        with ticker.on(lambda: f"{done} of 9"):
            while len(lines) < 2:
                time.sleep(0.005)
            done = 4
            while "4 of 9" not in lines[-1]:
                time.sleep(0.005)
        assert all(re.fullmatch(r"[04] of 9 \(0 s\)", line) for line in lines)
        with ticker.on(lambda: "other"):
            while "other" not in lines[-1]:
                time.sleep(0.005)
    said = len(lines)
    time.sleep(0.1)
    assert len(lines) == said
