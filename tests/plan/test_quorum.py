"""`rollout.sglang.quorum`: numbers and shares of servers, and those that can never be reached."""

import pytest
from pydantic import ValidationError

from gtpo_megatron.config import RolloutConfig, SGLangConfig
from gtpo_megatron.plan.rollout import engine_problems


@pytest.mark.parametrize(
    ("quorum", "servers", "needed"),
    [(1, 4, 1), (3, 4, 3), ("75%", 4, 3), ("75%", 5, 4), ("1%", 4, 1), ("100%", 7, 7), ("50%", 0, 1)],
)
def test_a_quorum_is_a_number_or_a_share_of_servers(quorum: int | str, servers: int, needed: int) -> None:
    assert SGLangConfig(quorum=quorum).needed(servers) == needed


@pytest.mark.parametrize("quorum", [0, -1, 10_001, 0.5, "0%", "101%", "half", "75", "%", "7.5%"])
def test_what_is_neither_is_refused(quorum: object) -> None:
    with pytest.raises(ValidationError, match="quorum"):
        SGLangConfig(quorum=quorum)


@pytest.mark.parametrize(
    ("servers", "count"),
    [({"servers": 2}, 2), ({"urls": ("http://a:1", "http://b:1")}, 2), ({"urls_dir": "servers"}, 0)],
    ids=["started", "given", "that come and go"],
)
def test_a_quorum_above_the_number_of_servers_is_a_problem(servers: dict[str, object], count: int) -> None:
    def problems(quorum: int | str) -> list[str]:
        config = RolloutConfig(engine="sglang", sglang={**servers, "quorum": quorum})
        return [problem for problem in engine_problems(config) if "quorum" in problem]

    expected = [f"rollout.sglang.quorum: 3: there are {count} servers; ask for {count} or fewer"]
    assert problems(3) == (expected if count else [])
    assert problems(2) == problems("100%") == []
