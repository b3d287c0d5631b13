"""Whole evaluations: by an endpoint (a small server of the test), and by the embedded engine in a rank of its own."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.evaluation.compare import as_text, compare, plot
from gtpo_megatron.trajectories.store import TrajectoryStore
from tests.evaluation.evaluation_jobs import (
    evaluate,
    evaluate_by_servers_that_die,
    evaluate_interrupted,
    evaluate_noting,
    evaluate_twice,
    write_checkpoint,
)
from tests.evaluation.server import Server, fake_server
from tests.parallel.pool import RankPool


@pytest.fixture
def server() -> Iterator[Server]:
    with fake_server() as running:
        yield running


Make = Callable[..., RunConfig]


@pytest.fixture
def make(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> Make:
    """A run's configuration that evaluates on ten sums; sections are given as dictionaries."""
    rows = tmp_path / "sums.jsonl"
    rows.write_text("".join(f'{{"question": "{a}+5?", "answer": "{a + 5}"}}\n' for a in range(10)))
    data = {"path": str(rows), "system_prompt": "", "max_prompt_tokens": 64}

    def build(**sections: dict[str, Any]) -> RunConfig:
        base = {
            "name": "run",
            "dir": str(tmp_path),
            "model": {"path": str(tiny_checkpoint("llama")), "dtype": "fp32"},
            "data": data,
            "training": {"steps": 1},
            "rollout": {"max_new_tokens": 8, "batch_size": 4},
            "rewards": {"workers": 1},
            "evaluation": {"data": data, "samples": 2},
        }
        return RunConfig.model_validate(
            {
                key: {**value, **sections.get(key, {})} if isinstance(value, dict) else value
                for key, value in base.items()
            }
        )

    return build


def endpoint(server: Server, **settings: Any) -> dict[str, Any]:
    return {"endpoint": {"url": server.url, "model": "m", "concurrency": 2, "attempts": 2} | settings}


def test_an_endpoint_by_chat_and_by_completions(
    ranks: RankPool, make: Make, server: Server, tmp_path: Path
) -> None:
    chat = make(evaluation=endpoint(server, api_key="secret"))
    (found,) = ranks.run(1, evaluate, chat, tmp_path / "chat")
    suite = found["suites"]["data"]
    values = {name: value["value"] for name, value in suite["figures"].items()}
    # the two seeds of a prompt are neighbours: one is even
    assert (values["pass@1"], values["pass@2"], values["maj@2"]) == (0.5, 1.0, 0.5)
    assert (values["truncated"], values["no_answer"]) == (0.1, 0.0)
    assert values["length"] == pytest.approx((4 * 7 + 7.5 + 5 * 8) / 10)
    assert "entropy" not in values and found["grader"]["math-verify"]
    assert len(suite["rows"]) == suite["prompts"] == 10
    path, body, authorization = server.asked[0]
    assert (path, authorization) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 8, 1.0)
    (stored,) = [TrajectoryStore(tmp_path / "chat" / "data" / "trajectories").read(0)]
    assert len(stored) == 20 and {t.length for t in stored} == {0}
    assert {path.name for path in (tmp_path / "chat").iterdir()} == {
        "request.json",
        "evaluation.json",
        "table.md",
        "pass_at_k.png",
        "data",
    }
    assert "| data | 10 | 2 | pass@1 | 50.0% | 0.0 |" in (tmp_path / "chat" / "table.md").read_text()

    (again,) = ranks.run(
        1, evaluate, make(evaluation=endpoint(server, api="completions")), tmp_path / "completions"
    )
    assert again["suites"]["data"]["figures"] == suite["figures"]  # the same seeds
    assert server.asked[-1][0] == "/v1/completions" and server.asked[-1][1]["prompt"].endswith("+5?\n")


def test_an_endpoint_that_dies_half_way(ranks: RankPool, make: Make, server: Server, tmp_path: Path) -> None:
    config = make(evaluation=endpoint(server))
    server.faults = [503]  # mended by another attempt
    server.dies_after = 9
    (message,) = ranks.run(1, evaluate, config, tmp_path / "out")
    assert "failed 2 times" in message and "the same command goes on from there" in message
    kept = TrajectoryStore(tmp_path / "out" / "data" / "parts").read(0)
    assert 0 < len(kept) <= 9 and len(kept) % 2 == 0
    assert not (tmp_path / "out" / "evaluation.json").exists()

    server.dies_after, before = None, len(server.asked)
    (found,) = ranks.run(1, evaluate, config, tmp_path / "out")
    assert len(server.asked) - before == 20 - len(kept)  # only what was missing
    assert found["suites"]["data"]["figures"]["pass@1"]["value"] == 0.5
    assert found["suites"]["data"]["prompts"] == 10


def test_an_evaluation_says_how_far_it_is(
    ranks: RankPool, make: Make, server: Server, tmp_path: Path
) -> None:
    server.held = (9, tmp_path / "seen")  # the others wait until a line has said how far it is
    config = make(evaluation=endpoint(server))
    (lines,) = ranks.run(1, evaluate_noting, config, tmp_path / "out", tmp_path / "seen")
    assert re.fullmatch(
        r"data: [45] of 10 prompts \(\d+ s\)", next(line for line in lines if "prompts" in line)
    )
    assert lines[-1] == "data: 10 of 10 prompts"
    # of a part that the embedded engine has sampled too
    (lines,) = ranks.run(1, evaluate_noting, make(), tmp_path / "embedded", tmp_path / "seen")
    assert [line for line in lines if not line.endswith(" s)")] == [
        "data: 8 of 10 prompts",
        "data: 10 of 10 prompts",
    ]


def test_an_endpoint_that_refuses(ranks: RankPool, make: Make, server: Server, tmp_path: Path) -> None:
    server.faults = [404] * 40
    (message,) = ranks.run(1, evaluate, make(evaluation=endpoint(server)), tmp_path / "out")
    assert 'refused the request (404): {"error": "so"}' in message
    (message,) = ranks.run(
        1, evaluate, make(evaluation=endpoint(server, url="localhost:8")), tmp_path / "out2"
    )
    assert "give a base URL" in message
    (message,) = ranks.run(
        1, evaluate, make(evaluation=endpoint(server, api_key="env:NO_SUCH_KEY")), tmp_path / "out3"
    )
    assert "env:NO_SUCH_KEY: there is no such environment variable" in message


def test_another_request_needs_another_directory_and_bad_k_is_said_first(
    ranks: RankPool, make: Make, server: Server, tmp_path: Path
) -> None:
    ranks.run(1, evaluate, make(evaluation=endpoint(server)), tmp_path / "out")
    (message,) = ranks.run(1, evaluate, make(evaluation=endpoint(server) | {"seed": 8}), tmp_path / "out")
    assert "holds another evaluation (other suites)" in message
    (message,) = ranks.run(1, evaluate, make(evaluation=endpoint(server) | {"k": [4]}), tmp_path / "new")
    assert message.startswith("evaluation.k: 4 is not from 1 to the number of samples, 2")
    assert not (tmp_path / "new").exists()


def test_the_embedded_engine_goes_on_to_the_same_figures(ranks: RankPool, make: Make, tmp_path: Path) -> None:
    config = make()
    whole, again = ranks.run(1, evaluate_twice, config, tmp_path / "whole", tmp_path / "again")[0]
    assert whole == again
    suite = whole["suites"]["data"]
    assert suite["figures"]["length"]["value"] > 1 and suite["figures"]["entropy"]["value"] > 0
    (interrupted,) = ranks.run(1, evaluate_interrupted, config, tmp_path / "cut")
    assert interrupted == "cut"
    assert TrajectoryStore(tmp_path / "cut" / "data" / "parts").steps() == [0]
    (found,) = ranks.run(1, evaluate, config, tmp_path / "cut")
    assert found == whole


def test_servers_that_die_half_way(ranks: RankPool, make: Make, tmp_path: Path) -> None:
    config = make()
    (message,) = ranks.run(1, evaluate_by_servers_that_die, config, tmp_path / "out", 3)
    assert message == "no server is left"
    assert len(TrajectoryStore(tmp_path / "out" / "data" / "parts").read(0)) == 3 * 2
    assert not (tmp_path / "out" / "evaluation.json").exists()
    (found,) = ranks.run(1, evaluate, config, tmp_path / "out")
    assert (found["suites"]["data"]["prompts"], found["suites"]["data"]["samples"]) == (10, 2)


def test_a_megatron_checkpoint_is_the_policy_that_it_holds(
    ranks: RankPool, make: Make, tmp_path: Path
) -> None:
    config = make()
    (original,) = ranks.run(1, evaluate, config, tmp_path / "hf")
    ranks.run(1, write_checkpoint, Path(config.model.path), tmp_path / "checkpoint")
    model = {"path": str(tmp_path / "checkpoint"), "dtype": "fp32"}
    (found,) = ranks.run(1, evaluate, make(model=model), tmp_path / "out")
    assert found["suites"] == original["suites"]
    assert found["policy"]["kind"] == "checkpoint"
    assert found["policy"]["name"] == str(tmp_path / "checkpoint")
    (message,) = ranks.run(
        1, evaluate, make(model={"path": str(tmp_path / "out"), "dtype": "fp32"}), tmp_path / "none"
    )
    assert "neither a" in message


def test_two_ranks_find_what_one_does(ranks: RankPool, make: Make, tmp_path: Path) -> None:
    (one,) = ranks.run(1, evaluate, make(), tmp_path / "one")
    both = ranks.run(2, evaluate, make(), tmp_path / "two")
    assert both[0] == both[1]
    assert both[0]["suites"]["data"]["prompts"] == one["suites"]["data"]["prompts"] == 10


def test_compare(ranks: RankPool, make: Make, server: Server, tmp_path: Path) -> None:
    ranks.run(1, evaluate, make(evaluation=endpoint(server)), tmp_path / "a")
    (tmp_path / "b").mkdir()
    results = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    rows = results["suites"]["data"]["rows"]
    for row, right in ((rows[0], 2), (rows[1], 2), (rows[2], 0)):
        row["right"], row["values"]["pass@1"] = right, right / 2
    del rows[9]
    (tmp_path / "b" / "evaluation.json").write_text(json.dumps(results))
    found = compare(tmp_path / "a", tmp_path / "b")["suites"]["data"]
    assert (found["prompts"], found["alone"], found["same_sampling"]) == (9, {"a": 1, "b": 0}, True)
    difference = found["figures"]["pass@1"]["difference"]
    assert difference["value"] == pytest.approx(0.5 / 9)
    assert difference["low"] < 0 < difference["high"]
    assert [(row["id"], row["a"], row["b"]) for row in found["changed"]] == [
        ("3", "1/2", "0/2"),
        ("1", "1/2", "2/2"),
        ("2", "1/2", "2/2"),
    ]
    text = as_text(compare(tmp_path / "a", tmp_path / "b"))
    assert "2 prompts better, 1 worse" in text and "1 of A alone" in text
    plot(tmp_path / "both.png", compare(tmp_path / "a", tmp_path / "b"))
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"nowhere/both\.png: No such file"):
        plot(tmp_path / "nowhere" / "both.png", compare(tmp_path / "a", tmp_path / "b"))

    results["grader"]["math-verify"] = "0"
    (tmp_path / "b" / "evaluation.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="judged by different graders"):
        compare(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "evaluation.json").write_text('{"format": "')
    with pytest.raises(UserError, match="not JSON, it is damaged"):
        compare(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="give the directory of a finished"):
        compare(tmp_path / "a", tmp_path / "nowhere")
