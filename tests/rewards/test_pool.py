"""The scoring processes: order, bounds, and every way in which a verifier can fail."""

import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gtpo_megatron.config import RewardConfig, RewardTerm
from gtpo_megatron.errors import UserError
from gtpo_megatron.rewards.pool import RewardPool, Score

USER = "tests.rewards.user_terms"


def user_term(function: str, **options) -> RewardTerm:
    return RewardTerm(kind="python", function=f"{USER}:{function}", **options)


def child_pids() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def wait_until_gone(pids: set[int]) -> None:
    """Fail unless they end soon; a zombie, which waits for its parent or init, has ended."""

    def alive(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running: {pids}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def moody() -> Iterator[RewardPool]:
    """One pool for all the ways to fail: each must leave it usable."""
    config = RewardConfig(terms=(user_term("moody", name="moody", weight=2.0),), workers=2, timeout_s=2.0)
    with RewardPool(config) as pool:
        yield pool


def test_weights_terms_and_options() -> None:
    config = RewardConfig(
        terms=(
            RewardTerm(kind="paper_format", weight=0.5),
            user_term("half", name="half", weight=2.0, options={"offset": 1.0}),
            user_term("heavy_modules", name="torch"),
        ),
        workers=1,
    )
    text = "<reasoning>r</reasoning><answer>4</answer>"
    with RewardPool(config) as pool:
        (score,) = pool.submit([(text, "4", "2 + 2")]).result()
    half = len(text) / 2 + 1.0
    # No torch in a worker: it would cost seconds at every start, and memory.
    assert score == Score(0.5 * 10.0 + 2.0 * half, {"paper_format": 10.0, "half": half, "torch": 0.0})


def test_the_default_reward_is_the_papers() -> None:
    texts = ["<reasoning>r</reasoning><answer>4</answer>", "<reasoning>r</reasoning><answer>5</answer>", "4"]
    with RewardPool(RewardConfig(workers=1)) as pool:
        scores = pool.submit([(text, "4", "2 + 2") for text in texts]).result()
    assert [score.total for score in scores] == [20.0, 10.0, 0.0]
    assert scores[0].terms == {"paper_format": 10.0, "paper_correctness": 10.0}


def test_results_keep_their_order_and_batches_their_own() -> None:
    config = RewardConfig(terms=(user_term("echo_context", name="echo"),), workers=3)
    with RewardPool(config) as pool:
        batches = [pool.submit([("", str(a), str(q)) for q in range(20)]) for a in range(3)]
        totals = [[score.total for score in batch.result()] for batch in batches]
    assert totals == [[a * 100.0 + q for q in range(20)] for a in range(3)]


@pytest.mark.parametrize(
    ("completion", "error"),
    [
        ("hang", "no result within 2 s"),
        ("raise", "moody: ValueError: no such luck .*user_terms.py:"),
        ("exit", "moody: SystemExit: 3"),
        ("_exit", "the scoring process exited with status 7"),
        ("kill", r"the scoring process was killed by signal 9"),
        ("nan", "moody: returned nan, not a finite number"),
        ("text", "moody: ValueError: could not convert string to float"),
    ],
)
def test_a_failing_verifier_costs_only_that_completion(
    moody: RewardPool, completion: str, error: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "gtpo_megatron.rewards.pool"):
        before, failed, after = moody.submit(
            [(text, "4", "q") for text in ("fine", completion, "fine")]
        ).result()
    assert before == after == Score(2.0, {"moody": 1.0})
    assert (failed.total, failed.terms) == (0.0, {"moody": 0.0})
    assert re.match(error, failed.error)
    assert len(caplog.records) == 1 and failed.error in caplog.text and repr(completion) in caplog.text


def test_equal_warnings_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    config = RewardConfig(terms=(user_term("moody"),), workers=2)
    with RewardPool(config) as pool, caplog.at_level(logging.WARNING, "gtpo_megatron.rewards.pool"):
        scores = pool.submit([("raise", "4", "q")] * 16 + [("nan", "4", "q")] * 4).result()
    assert all(score.error for score in scores)
    assert len(caplog.records) == 2 and "no such luck" in caplog.text and "returned nan" in caplog.text


def test_a_method_of_a_class_scores() -> None:
    with RewardPool(RewardConfig(terms=(user_term("Judge.score"),), workers=1)) as pool:
        assert [score.total for score in pool.submit([("4", "4", ""), ("5", "4", "")]).result()] == [1.0, 0.0]


@pytest.mark.parametrize("kind", ["format", "paper_correctness"])
def test_a_misspelt_option_is_an_error_at_once(kind: str) -> None:
    with pytest.raises(UserError, match=f"rewards.terms: {kind}: .*'scal'"):
        RewardPool(RewardConfig(terms=(RewardTerm(kind=kind, options={"scal": 1}),), workers=1))


def test_a_verifiers_children_die_with_it(moody: RewardPool) -> None:
    (score,) = moody.submit([("hang with child", "4", "q")]).result()
    assert score.error == "no result within 2 s"
    wait_until_gone(
        {p.pid for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "612.75"]}
    )


def test_a_step_with_too_many_failures_stops_the_run(moody: RewardPool) -> None:
    good, bad = Score(2.0, {"moody": 1.0}), Score(0.0, {"moody": 0.0}, "moody: ValueError: no such luck")
    moody.check([])
    moody.check([good, bad])
    with pytest.raises(UserError, match=r"2 of 3 completions .*max_failed_share = 0.5 .*no such luck"):
        moody.check([good, bad, bad])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package.rewards:f", "ModuleNotFoundError: No module named 'no_such_package'"),
        (f"{USER}:missing", "AttributeError: .* has no attribute 'missing'"),
        (f"{USER}:RESULT", "TypeError: .* is a int, not a function"),
        (USER, "not of the form package.module:function"),
    ],
)
def test_a_function_that_does_not_import_is_an_error_at_once(path: str, message: str) -> None:
    with pytest.raises(UserError, match=f"rewards.terms: {path}: .*{message}"):
        RewardPool(RewardConfig(terms=(RewardTerm(kind="python", function=path),), workers=1))


@pytest.mark.parametrize("names", [("a", "a"), ("mean", "b")])
def test_names_must_be_distinct_and_not_reserved(names: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=f"'{names[0]}' is taken"):
        RewardPool(RewardConfig(terms=tuple(RewardTerm(kind="format", name=name) for name in names)))


def test_signals_to_a_whole_job_step_do_not_end_the_workers() -> None:
    before = child_pids()
    with RewardPool(RewardConfig(terms=(user_term("half", name="half"),), workers=1)) as pool:
        workers = child_pids() - before
        assert workers
        for number in (signal.SIGUSR1, signal.SIGTERM):
            for pid in workers:
                os.kill(pid, number)
        assert [score.error for score in pool.submit([("ab", "", "")] * 2).result()] == [None, None]
        assert child_pids() - before == workers


def test_close_ends_the_workers_even_while_one_hangs() -> None:
    before = child_pids()
    pool = RewardPool(RewardConfig(terms=(user_term("moody"),), workers=2, timeout_s=600.0))
    workers = child_pids() - before
    batch = pool.submit([("hang", "4", "q")] * 5)
    pool.close()
    pool.close()
    assert batch.done() and len(workers) == 2
    wait_until_gone(workers)


def test_workers_die_with_a_killed_parent() -> None:
    program = textwrap.dedent(f"""
        import os, signal, psutil
        from gtpo_megatron.config import RewardConfig, RewardTerm
        from gtpo_megatron.rewards.pool import RewardPool
        pool = RewardPool(RewardConfig(terms=(RewardTerm(kind="python", function="{USER}:moody"),), workers=1, timeout_s=600))
        pool.submit([("hang", "4", "q")])
        print(*(child.pid for child in psutil.Process().children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    (pid,) = map(int, ended.stdout.split())
    wait_until_gone({pid})
