"""A trainer in small, for test_owned: starts a server of its own and samples until it is killed; says what it sees."""

import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.rollout.protocol import PromptRequest, SamplingParams
from gtpo_megatron.rollout.sglang import SGLangEngine, Timing


def main() -> None:
    checkpoint, python, logs = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)  # so that a server with the checkpoint's weights would show
    config = SGLangConfig(servers=1, python=python, start_timeout_s=400, api_key="env:OWNED_KEY", router=True)
    timing = Timing(health_interval_s=1.0, health_pause_s=0.3, health_timeout_s=8.0, health_failures=2)
    engine = SGLangEngine(config, checkpoint, "fp32", Path(logs), "cpu", timing)
    engine.update_weights(model.state_dict().items(), 0)
    step = 0
    while True:
        while engine.router_url is None:  # it is told of every server
            time.sleep(0.2)
        groups = list(engine.generate([PromptRequest(0, (5, 6, 7), 0)], SamplingParams(4, 64)))
        engine.verify_weights(model.state_dict().items())
        url = next(iter(engine.status()))
        print(f"step {step} {len(groups[0].completions)} {url} {engine.router_url}", flush=True)
        step += 1


if __name__ == "__main__":
    main()
