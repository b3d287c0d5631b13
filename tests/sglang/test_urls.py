"""Where the URLs of servers that others start come from."""

import asyncio
from pathlib import Path

import pytest

from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.registry import register, this_server
from gtpo_megatron.rollout.sglang.servers import urls
from gtpo_megatron.rollout.sglang.servers.urls import follow_urls, read_urls


def test_a_folder_that_cannot_be_read_is_not_one_without_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, away = tmp_path / "servers", tmp_path / "away"
    config = SGLangConfig(urls_dir=str(folder))
    assert read_urls(config) == []  # none has come yet
    register(folder, this_server("http://node1:4000"))
    assert read_urls(config) == ["http://node1:4000"]
    monkeypatch.setattr(urls, "FOLLOW_S", 0.001)

    async def follow() -> list[str]:
        folder.rename(away)
        folder.write_text("")  # what cannot be listed
        following = follow_urls(config)
        answer = asyncio.ensure_future(anext(following))
        while not caplog.records and not answer.done():
            await asyncio.sleep(0.001)
        assert not answer.done()  # the servers stay as they are
        folder.unlink()
        away.rename(folder)
        return await answer

    with pytest.raises(UserError, match="rollout.sglang.urls_dir: .*Not a directory"):
        away.write_text("")
        read_urls(SGLangConfig(urls_dir=str(away)))
    away.unlink()
    assert asyncio.run(follow()) == ["http://node1:4000"]
    assert [record.getMessage() for record in caplog.records] == [
        f"the servers stay as they are: rollout.sglang.urls_dir: [Errno 20] Not a directory: '{folder}'"
    ]
