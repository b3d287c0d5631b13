"""Metrics: valid JSON lines whatever the values, an exact cut on resume, and the other loggers."""

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gtpo_megatron.config import LoggingConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.run.metrics import MetricsWriter, read_metrics

FILE_ONLY = LoggingConfig(tensorboard=False)


def test_every_line_is_json_and_there_before_the_writer_is_closed(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "run", FILE_ONLY)
    writer.log(
        1,
        {
            "loss": float("nan"),
            "a": np.float32(0.5),
            "b": torch.tensor(2.0),
            "n": 3,
            "stage": "sft",
            "gone": None,
        },
    )
    writer.log(2, {"loss": math.inf, "lr": 1e-6})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert first.pop("time") > 0
    assert first == {"step": 1, "loss": None, "a": 0.5, "b": 2.0, "n": 3, "stage": "sft", "gone": None}
    assert (second["step"], second["loss"], second["lr"]) == (2, None, 1e-6)
    writer.close()


def test_resuming_drops_the_later_steps_and_appends(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, FILE_ONLY) as writer:
        for step in range(1, 6):
            writer.log(step, {"loss": step})
    with MetricsWriter(tmp_path, FILE_ONLY) as writer:
        writer.truncate_after(3)
        writer.log(4, {"loss": 40})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]
    assert [row["step"] for row in read_metrics(tmp_path / "discarded.jsonl")] == [4, 5]
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.jsonl", "discarded.jsonl"}


def test_a_line_cut_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1]
    with MetricsWriter(tmp_path, FILE_ONLY) as writer:
        writer.log(2, {"loss": 2.0})
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_a_damaged_or_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(UserError, match="metrics.jsonl: no such file"):
        read_metrics(path)
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UserError, match="metrics.jsonl: line 2 is not JSON"):
        read_metrics(path)


def test_tensorboard_holds_the_numbers_and_forgets_purged_steps(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, LoggingConfig()) as writer:
        for step in (1, 2, 3):
            writer.log(step, {"reward/mean": step / 2, "stage": "sft"})
    with MetricsWriter(tmp_path, LoggingConfig()) as writer:
        writer.truncate_after(1)
        writer.log(2, {"reward/mean": 9.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.5), (2, 9.0)]


def test_a_run_goes_on_without_curves_where_they_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("not a directory")
    with MetricsWriter(tmp_path, LoggingConfig()) as writer:
        writer.log(1, {"loss": 1.0})
        writer.log(2, {"loss": 2.0})
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0]
    (warning,) = caplog.records
    assert "tensorboard: cannot be written (File exists): no more curves" in warning.getMessage()


def test_wandb_gets_the_numbers_under_an_id_that_a_resumed_run_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, logged, finished = [], [], []

    def init(**options: object) -> types.SimpleNamespace:
        started.append(options)
        return types.SimpleNamespace(
            log=lambda numbers, step: logged.append((step, numbers)), finish=lambda: finished.append(True)
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    config = LoggingConfig(tensorboard=False, wandb=True, wandb_project="p")
    for step in (1, 2):
        with MetricsWriter(tmp_path / "run", config) as writer:
            writer.log(step, {"loss": 0.5, "stage": "sft"})
    assert logged == [(1, {"loss": 0.5}), (2, {"loss": 0.5})]
    assert started[0] == started[1] and (started[0]["project"], started[0]["name"]) == ("p", "run")
    assert finished == [True, True]


def test_wandb_asked_for_and_missing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="logging.wandb: true, but wandb is not installed"):
        MetricsWriter(tmp_path, LoggingConfig(wandb=True))


@pytest.mark.parametrize(
    "line", [b"null", b"[1]", b'"step"', b"{}", b'{"step": "2"}', b'{"step": 2, "x": "\xff"}', b"\xff\xfe"]
)
def test_a_line_that_is_no_step_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is not"):
        read_metrics(path)
