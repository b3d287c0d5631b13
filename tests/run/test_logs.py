"""What reaches the console, and what only the file of the rank."""

import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from gtpo_megatron.run.logs import NOISE, TALKATIVE, logging_to, quiet_libraries


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    filters = {name: list(logging.getLogger(name).filters) for name in NOISE}
    levels = {name: logging.getLogger(name).level for name in TALKATIVE}
    with warnings.catch_warnings():
        yield
    for name, before in filters.items():
        logging.getLogger(name).filters[:] = before
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_the_console_has_our_warnings_and_everybodys_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    quiet_libraries()
    library = logging.StreamHandler()  # as a library's basicConfig leaves one
    logging.getLogger().addHandler(library)
    try:
        with logging_to(tmp_path / "rank-0.log"):
            for name in ("gtpo_megatron.x", "library"):
                for level in (logging.INFO, logging.WARNING, logging.ERROR):
                    logging.getLogger(name).log(level, "%s says %d", name, level)
        assert library in logging.getLogger().handlers
    finally:
        logging.getLogger().removeHandler(library)
    assert stream.getvalue().splitlines() == [
        "WARNING gtpo_megatron.x: gtpo_megatron.x says 30",
        "ERROR gtpo_megatron.x: gtpo_megatron.x says 40",
        "ERROR library: library says 40",
    ]
    assert len((tmp_path / "rank-0.log").read_text().splitlines()) == 6


def test_noise_is_quiet_and_the_rest_of_its_loggers_is_not(caplog: pytest.LogCaptureFixture) -> None:
    quiet_libraries()
    quiet_libraries()
    for name, text in NOISE.items():
        assert len(logging.getLogger(name).filters) == 1
        logging.getLogger(name).warning(f"{text} and so on")
        logging.getLogger(name).warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"] * len(NOISE)
    with pytest.warns(FutureWarning, match="another") as caught:
        quiet_libraries()
        warnings.warn("Please use DTensor instead and we are deprecating ShardedTensor.", FutureWarning, 1)
        warnings.warn("another", FutureWarning, 1)
    assert len(caught) == 1
