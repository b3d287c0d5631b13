"""The manifest of a checkpoint that several ranks describe, where they do not see the same files."""

from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

from tests.parallel.pool import RankPool


def described(partial: Path, stale_on: int) -> list[str]:
    """The manifest's names, made with a rank whose listing is that of a moment ago: empty."""
    from gtpo_megatron.policy.checkpoint import files
    from gtpo_megatron.policy.checkpoint.checkpointer import finish_files, verify

    listed = files.files_below
    stale = dist.get_rank() == stale_on
    with patch.object(files, "files_below", lambda directory: [] if stale else listed(directory)):
        finish_files(partial, step=1)
    return sorted(verify(partial)["files"])


def test_a_rank_with_an_old_listing_leaves_no_file_out(ranks: RankPool, tmp_path: Path) -> None:
    names = [f"part-{number}" for number in range(5)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 100)
    assert ranks.run(3, described, tmp_path, 1) == [names] * 3


def lost(partial: Path) -> str:
    """What is said when a rank's checksums get lost on their way."""
    from gtpo_megatron.errors import UserError
    from gtpo_megatron.policy.checkpoint import files
    from gtpo_megatron.policy.checkpoint.checkpointer import finish_files

    describe = files.describe_and_flush
    with patch.object(files, "describe_and_flush", lambda d, n: {} if dist.get_rank() else describe(d, n)):
        try:
            finish_files(partial, step=1)
        except UserError as error:
            return str(error)
    return "written"


def test_a_manifest_that_lacks_a_file_is_not_written(ranks: RankPool, tmp_path: Path) -> None:
    for name in ("a", "bb"):  # the larger is rank 0's
        (tmp_path / name).write_text(name)
    assert ranks.run(2, lost, tmp_path) == [f"{tmp_path}: not every file has a checksum: ['a']"] * 2
    assert not (tmp_path / "manifest.json").exists()
