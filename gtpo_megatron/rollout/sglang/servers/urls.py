"""The URLs of servers that others start: from the configuration, and from a file or a folder that is followed."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.registry import registered

log = logging.getLogger(__name__)
FOLLOW_S = 1.0


def read_urls(config: SGLangConfig) -> list[str]:
    """The given servers' URLs, without trailing slashes or repetition.

    Raises:
        UserError: a line of urls_file, or an entry of urls, is no http URL; or there is none; or what names them cannot
            be read. A urls_dir may be empty: its servers come and go.
    """
    if config.urls_dir:
        try:
            return [server.url.rstrip("/") for server in registered(Path(config.urls_dir))]
        except OSError as error:
            raise UserError(f"rollout.sglang.urls_dir: {error}") from error
    entries = [(f"rollout.sglang.urls[{i}]", url) for i, url in enumerate(config.urls)]
    if config.urls_file:
        try:
            lines = Path(config.urls_file).read_text().splitlines()
        except OSError as error:
            raise UserError(f"rollout.sglang.urls_file: {error}") from error
        entries += [
            (f"{config.urls_file}:{i}", line.strip())
            for i, line in enumerate(lines, 1)
            if line.strip() and not line.strip().startswith("#")
        ]
    for where, url in entries:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{where}: {url!r} is not a server's URL; write http://host:port")
    urls = list(dict.fromkeys(url.rstrip("/") for _, url in entries))
    if not urls:
        raise UserError(f"{config.urls_file}: no URL of a server; write one a line")
    return urls


async def follow_urls(config: SGLangConfig) -> AsyncIterator[list[str]]:
    """The URLs of urls_file or urls_dir, again and again. What cannot be read, or not as URLs, changes nothing."""
    problem = ""
    while True:
        await asyncio.sleep(FOLLOW_S)
        try:
            urls = await asyncio.to_thread(read_urls, config)
        except UserError as error:
            if str(error) != problem:
                problem = str(error)
                log.warning("the servers stay as they are: %s", problem)
            continue
        problem = ""
        yield urls
