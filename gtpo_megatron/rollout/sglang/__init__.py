"""Rollouts from SGLang servers."""

from gtpo_megatron.rollout.sglang.engine import SGLangEngine
from gtpo_megatron.rollout.sglang.servers.states import Timing

__all__ = ["SGLangEngine", "Timing"]
