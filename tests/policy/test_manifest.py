"""The manifest of a checkpoint that several ranks describe, where they do not see the same files."""

import os
import shutil
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


def test_latest_of_a_run_that_was_copied_with_its_links_followed_is_a_link_again(tmp_path: Path) -> None:
    from gtpo_megatron.policy.checkpoint import files

    def save(step: int) -> Path:
        partial = files.new_partial(tmp_path / "run", step)
        (partial / "part").write_text(str(step))
        return files.publish(partial, step)

    save(1)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")  # follows links
    assert not (tmp_path / "copy" / "latest").is_symlink()
    (tmp_path / "run").rename(tmp_path / "original")
    (tmp_path / "copy").rename(tmp_path / "run")
    save(2)
    assert os.readlink(tmp_path / "run" / "latest") == "step-000002"
    assert sorted(os.listdir(tmp_path / "run")) == ["latest", "step-000001", "step-000002"]
    assert files.list_checkpoints(tmp_path / "run") == [tmp_path / "run" / f"step-00000{n}" for n in (2, 1)]
