"""Servers that register: what counts as up."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gtpo_megatron.registry import STALE_S, register, registered, this_server, unregister


def test_a_server_is_there_until_it_leaves(tmp_path: Path) -> None:
    folder = tmp_path / "servers"
    assert registered(folder) == []
    one, two = this_server("http://node1:4000"), this_server("http://node2:4000")
    register(folder, two)
    register(folder, one)
    assert [server.url for server in registered(folder)] == [one.url, two.url]
    register(folder, one)  # a beat
    assert len(registered(folder)) == 2
    assert registered(folder)[0].heartbeat > one.heartbeat
    unregister(folder, one)
    unregister(folder, one)
    assert [server.url for server in registered(folder)] == [two.url]
    assert [path.name for path in folder.iterdir()] == ["node2-4000.json"]  # nothing half-written is left


def test_one_that_is_no_longer_heard_of_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = this_server("http://node1:4000")
    register(tmp_path, server)
    beat = registered(tmp_path)[0].heartbeat
    monkeypatch.setattr("time.time", lambda: beat + STALE_S - 1)
    assert registered(tmp_path)
    monkeypatch.setattr("time.time", lambda: beat + STALE_S)
    assert registered(tmp_path) == []


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"url": "http://node1:1"}', json.dumps(vars(replace(this_server(""), url="node1"))),
     json.dumps(vars(replace(this_server("http://node1:x")))),
     json.dumps(vars(this_server("http://node1:1")) | {"heartbeat": "now"})],
    ids=["empty", "cut short", "a list", "fields missing", "no URL", "no port", "no time"],
)  # fmt: skip
def test_a_damaged_file_is_passed_over(tmp_path: Path, content: str) -> None:
    register(tmp_path, this_server("http://node2:4000"))
    (tmp_path / "node1.json").write_text(content)
    (tmp_path / ".key").write_text("secret")
    assert [server.url for server in registered(tmp_path)] == ["http://node2:4000"]
