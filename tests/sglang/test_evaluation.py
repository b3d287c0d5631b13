"""Evaluations by a real SGLang server: as rollout servers given by URL, and as an OpenAI-compatible endpoint."""

from pathlib import Path
from typing import Any

from gtpo_megatron.config import RunConfig
from gtpo_megatron.trajectories.store import TrajectoryStore
from tests.evaluation.evaluation_jobs import evaluate
from tests.parallel.pool import RankPool
from tests.sglang.conftest import Servers


def run_config(directory: Path, servers: Servers, **sections: dict[str, Any]) -> RunConfig:
    rows = directory / "sums.jsonl"
    rows.write_text("".join(f'{{"question": "{a}+5?", "answer": "{a + 5}"}}\n' for a in range(6)))
    data = {"path": str(rows), "system_prompt": "", "max_prompt_tokens": 64}
    return RunConfig.model_validate(
        {
            "name": "run",
            "dir": str(directory),
            "model": {"path": str(servers.checkpoint), "dtype": "fp32"},
            "data": data,
            "training": {"steps": 1},
            "rewards": {"workers": 1},
            "rollout": {"max_new_tokens": 8, **sections.get("rollout", {})},
            "evaluation": {"data": data, **sections.get("evaluation", {})},
        }
    )


def test_servers_and_endpoint_find_what_the_embedded_engine_does(
    ranks: RankPool, servers: Servers, tmp_path: Path
) -> None:
    sglang = {"engine": "sglang", "sglang": {"urls": servers.urls, "bucket_mb": 1}}
    (by_servers,) = ranks.run(
        1, evaluate, run_config(tmp_path, servers, rollout=sglang), tmp_path / "servers"
    )
    (embedded,) = ranks.run(1, evaluate, run_config(tmp_path, servers), tmp_path / "embedded")
    endpoint = {"endpoint": {"url": f"{servers.urls[0]}/v1", "model": str(servers.checkpoint)}}
    (by_endpoint,) = ranks.run(
        1, evaluate, run_config(tmp_path, servers, evaluation=endpoint), tmp_path / "endpoint"
    )
    tokens = {
        name: [t.token_ids.tolist() for t in TrajectoryStore(tmp_path / name / "data/trajectories").read(0)]
        for name in ("servers", "embedded")
    }
    same = sum(a == b for a, b in zip(tokens["servers"], tokens["embedded"], strict=True))
    assert same >= 5  # greedy, of 6; a near tie may go either way
    for found in (by_servers, by_endpoint):
        suite = found["suites"]["data"]
        assert suite["prompts"] == 6 and suite["scoring_failed"] == 0
        assert 0 < suite["figures"]["length"]["value"] <= 8
    assert [found["engine"] for found in (by_servers, embedded, by_endpoint)] == [
        "sglang",
        "embedded",
        "endpoint",
    ]
