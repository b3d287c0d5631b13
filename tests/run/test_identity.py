"""What a new owner of a run's directory finds there, and what it removes."""

from pathlib import Path

from gtpo_megatron.run.identity import remove_leftovers


def test_copies_of_weights_are_removed_and_nothing_else(tmp_path: Path) -> None:
    remove_leftovers(tmp_path)  # a new run has no logs yet
    elsewhere = tmp_path / "elsewhere"
    for directory in ("logs/weights-3", "logs/verify-0a1b2c3d", "logs/other-1", "weights-4", "elsewhere"):
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / "model.safetensors").write_bytes(b"0")
    (tmp_path / "logs/sglang-0.log").write_text("")
    (tmp_path / "logs/weights-5").symlink_to(elsewhere)
    remove_leftovers(tmp_path)
    left = {path.name for path in (tmp_path / "logs").iterdir()}
    assert left == {"other-1", "sglang-0.log", "weights-5"}
    assert (elsewhere / "model.safetensors").exists() and (tmp_path / "weights-4").exists()
