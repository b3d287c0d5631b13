"""The engine inside the trainer: transformers' generation on weights that come through the Hugging Face export."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from gtpo_megatron.rollout.protocol import Completion, Group, NamedTensor, PromptRequest, SamplingParams


class _Aborted(Exception):
    """Leaves transformers' generation between two tokens."""


class SeededSampling(LogitsProcessor):
    """Sampling whose outcome depends on each completion's own seed alone, not on what else is in the batch.

    Every row draws Gumbel noise from its own generator; the arg max of logits plus noise is a sample of their softmax, so
    greedy search over what this returns samples. Keeps the logprob of each choice under the tempered full distribution.
    `check` is called before each token, and may raise.
    """

    def __init__(
        self,
        params: SamplingParams,
        seeds: Sequence[int],
        device: torch.device,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.params = params
        self.check = check
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.logprobs: list[Tensor] = []  # one [rows] per position
        self.warpers = LogitsProcessorList()
        if params.top_k:
            self.warpers.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(params.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[rows, vocabulary] logits -> scores whose arg max is the sampled token."""
        self.check()
        scores = scores.float()
        if self.params.temperature > 0:
            scores = scores / self.params.temperature
        kept = self.warpers(input_ids, scores)
        if self.params.temperature > 0:
            kept = kept + self._gumbel(scores)
        choice = kept.argmax(dim=-1, keepdim=True)
        self.logprobs.append((scores.gather(1, choice) - scores.logsumexp(dim=-1, keepdim=True))[:, 0])
        return kept

    def _gumbel(self, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return -noise.log()


class EmbeddedEngine:
    """A RolloutEngine on this rank's device. Every rank holds one and samples its share of the prompts."""

    on_every_rank = True
    updates_in_flight = False

    def __init__(
        self, model_path: str, dtype: torch.dtype, device: torch.device, batch_size: int, pad_id: int
    ) -> None:
        """`batch_size`: completions generated at once. Weights are missing until `update_weights`."""
        config = AutoConfig.from_pretrained(model_path)
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
        # the checkpoint's generation defaults (penalties, top-k) would change the distribution silently
        self.model.generation_config = GenerationConfig(pad_token_id=pad_id)
        self.device, self.batch_size, self.pad_id = device, batch_size, pad_id
        self.version = -1
        self._aborted, self._ended = threading.Event(), threading.Event()  # the latter for good

    def wait_started(self) -> None:
        """Nothing: it is there."""

    def update_weights(self, weights: Iterable[NamedTensor], version: int) -> None:
        """Copy tensors by Hugging Face name. Raises KeyError for an unknown name, ValueError for missing tensors."""
        parameters = dict(self.model.named_parameters())
        tied = set(self.model.state_dict()) - set(parameters)
        missing = set(parameters)
        with torch.no_grad():
            for name, tensor in weights:
                if name in tied:
                    continue
                parameters[name].copy_(tensor)
                missing.discard(name)
        if missing:
            raise ValueError(f"weights of version {version} lack {len(missing)} tensors, e.g. {min(missing)}")
        self.version = version

    def generate(self, requests: Sequence[PromptRequest], params: SamplingParams) -> Iterator[Group]:
        """Groups in order of their prompts' length, so that batches waste little padding."""
        per_batch = max(1, self.batch_size // params.n)
        ordered = sorted(requests, key=lambda r: (len(r.prompt_ids), r.group))
        self._aborted.clear()
        for start in range(0, len(ordered), per_batch):
            try:
                groups = self._generate(ordered[start : start + per_batch], params)
            except _Aborted:
                return
            yield from groups

    @torch.no_grad()
    def _generate(self, requests: Sequence[PromptRequest], params: SamplingParams) -> list[Group]:
        self._raise_if_aborted()
        started = time.perf_counter()
        prompts = [r.prompt_ids for r in requests for _ in range(params.n)]
        seeds = [r.seed + i for r in requests for i in range(params.n)]
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        sampling = SeededSampling(params, seeds, self.device, self._raise_if_aborted)
        output = self.model.generate(
            ids.to(self.device),
            attention_mask=mask.to(self.device),
            do_sample=False,
            max_new_tokens=params.max_new_tokens,
            eos_token_id=list(params.stop_token_ids) or None,
            logits_processor=LogitsProcessorList([sampling]),
        )[:, width:].cpu()
        logprobs = torch.stack(sampling.logprobs, dim=1).cpu()
        seconds = time.perf_counter() - started
        completions = [self._completion(*row, params, seconds) for row in zip(output, logprobs, strict=True)]
        return [
            Group(request, tuple(completions[i * params.n : (i + 1) * params.n]))
            for i, request in enumerate(requests)
        ]

    def _completion(
        self, tokens: Tensor, logprobs: Tensor, params: SamplingParams, seconds: float
    ) -> Completion:
        stops = torch.isin(tokens, torch.tensor(params.stop_token_ids, dtype=tokens.dtype)).nonzero()
        length = int(stops[0]) + 1 if len(stops) else len(tokens)
        return Completion(
            token_ids=tokens[:length].numpy().astype(np.int32),
            logprobs=logprobs[:length].numpy().astype(np.float32),
            token_versions=np.full(length, self.version, np.int32),
            finish_reason="stop" if len(stops) else "length",
            seconds=seconds,
        )

    def abort_all(self, *, for_good: bool = False) -> None:
        """Leave the batch under way between two tokens; `for_good`: sample nothing any more."""
        if for_good:
            self._ended.set()
        self._aborted.set()

    def _raise_if_aborted(self) -> None:
        if self._aborted.is_set() or self._ended.is_set():
            raise _Aborted

    def waits_for(self) -> str:
        """Nothing: there is no server."""
        return ""

    def close(self) -> None:
        """Nothing to end."""
