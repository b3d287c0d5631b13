"""What training saw, beside the batch: exact, whole or not at all, and clear about damage."""

from pathlib import Path

import numpy as np
import pandas
import pytest

from gtpo_megatron.errors import UserError
from gtpo_megatron.trajectories.seen import Seen, read_seen, seen_path, write_seen
from tests.trajectories.test_store import trajectory

BATCH = [trajectory(3), trajectory(0, index=1), trajectory(5, index=2)]


def record(**fields: object) -> Seen:
    numbers = {
        name: np.array([k, np.nan, 1e-9], np.float32)
        for k, name in enumerate(("entropy", "coefficient", "gap", "gap_max"))
    }
    return Seen(**(numbers | fields))


def lists(scale: float) -> list[np.ndarray]:
    return [scale * np.arange(t.length, dtype=np.float32) for t in BATCH]


@pytest.mark.parametrize(
    "fields",
    [{}, {"gate": np.array([1, 0, 1], np.float32)}, {"logprobs": lists(-0.1), "entropies": lists(0.5)}],
)
def test_read_back_exactly(tmp_path: Path, fields: dict[str, object]) -> None:
    seen = record(**fields)
    path = write_seen(tmp_path, 3, BATCH, seen)
    found = read_seen(tmp_path, 3)
    for name in ("entropy", "coefficient", "gap", "gap_max", "gate"):
        np.testing.assert_array_equal(getattr(found, name), getattr(seen, name), err_msg=name)
    for name in ("logprobs", "entropies"):
        if getattr(seen, name) is None:
            assert getattr(found, name) is None
        else:
            for a, b in zip(getattr(found, name), getattr(seen, name), strict=True):
                np.testing.assert_array_equal(a, b)
    assert pandas.read_parquet(path)["index"].tolist() == [0, 1, 2]  # any reader opens it
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_entropies_rounded_to_bf16_take_two_bytes(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).random(100_000).astype(np.float32)
    batch = [trajectory(len(noise))]
    one = {name: np.zeros(1, np.float32) for name in ("entropy", "coefficient", "gap", "gap_max")}
    rounded = (noise.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert write_seen(tmp_path, 0, batch, Seen(**one, entropies=[rounded])).stat().st_size < 2.1 * len(noise)
    assert read_seen(tmp_path, 0).entropies[0].tobytes() == rounded.tobytes()


def test_what_is_of_another_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 completions, the batch 2"):
        write_seen(tmp_path, 0, BATCH[:2], record())
    with pytest.raises(ValueError, match="logprobs: other lengths"):
        write_seen(tmp_path, 0, BATCH, record(logprobs=lists(1.0)[::-1]))
    assert not list(tmp_path.iterdir())


def test_damage_and_absence(tmp_path: Path) -> None:
    assert read_seen(tmp_path, 0) is None
    seen_path(tmp_path, 0).write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"seen-00000000.parquet: damaged"):
        read_seen(tmp_path, 0)
    pandas.DataFrame({"entropy": [1.0]}).to_parquet(seen_path(tmp_path, 1))
    with pytest.raises(UserError, match="schema version none"):
        read_seen(tmp_path, 1)
