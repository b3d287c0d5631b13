"""A scenario upon scripted servers that hold weights already."""

from collections.abc import Awaitable, Callable

from tests.sglang.scripted import TIMING, Rehearsal, in_fake_time, rehearsal


def scenario(
    test: Callable[[Rehearsal], Awaitable[None]], count: int = 2, owned: bool = False, **config: object
) -> None:
    """Play a scenario on servers that are ready with the first update's weights."""

    async def play() -> None:
        async with rehearsal(count, TIMING, owned, **config) as running:
            await test(running)

    in_fake_time(play())
