"""What a new owner of a run's directory finds there, and what it removes; ranks that were not started alike."""

from pathlib import Path

from gtpo_megatron.errors import UserError
from gtpo_megatron.run.identity import remove_leftovers
from tests.parallel.pool import RankPool
from tests.training_jobs import small_run


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


def compared(directory: Path, rank: int, training: dict[str, object]) -> str:
    """What is said where one rank has other settings than the others."""
    import torch.distributed as dist

    from gtpo_megatron.run.identity import check_same_on_all_ranks

    own = training if dist.get_rank() == rank else {}
    config = small_run(directory, "run", directory, directory, training=own)
    try:
        check_same_on_all_ranks(config)
    except UserError as error:
        return str(error)
    return "the same"


def test_a_rank_with_another_configuration_is_named_on_all(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(3, compared, tmp_path, 1, {}) == ["the same"] * 3
    for rank in (1, 2):
        said = ranks.run(3, compared, tmp_path, rank, {"seed": 5, "steps": 9})
        expected = "training.seed: 5, on rank 0 0; training.steps: 9, on rank 0 3"
        assert len(set(said)) == 1
        assert said[0].startswith(
            f"rank {rank} was started with another configuration than rank 0: {expected}. Start all ranks"
        )
