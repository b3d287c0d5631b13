"""What trainer and servers both score, so that they can be compared (`rollout.sglang.audit.certificate`)."""

from transformers import PreTrainedTokenizerBase

from gtpo_megatron.config import RunConfig
from gtpo_megatron.data.prompts import PromptSet
from gtpo_megatron.rollout.collect import GroupPrompt, cut, solutions
from gtpo_megatron.trajectories.record import Trajectory

PROMPTS = 4


def fixed_sequences(
    config: RunConfig, prompts: PromptSet, tokenizer: PreTrainedTokenizerBase, step: int
) -> list[Trajectory]:
    """The first prompts with their solutions, as long as what is sampled may be: that fits the model and a micro-batch, which
    a data set's solution need not.
    """
    fixed = [GroupPrompt(i, prompt, 0, i) for i, prompt in enumerate(prompts.prompts[:PROMPTS])]
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    return [cut(t, longest - len(t.prompt_ids)) for t in solutions(fixed, tokenizer, step)]
