"""Core attention and normalisation of the layers that do without Transformer Engine (CPU, and GPUs that lack it).

Megatron-Core's own local modules know neither packed sequences (THD) nor context parallelism nor grouped queries without
expansion; torch's scaled_dot_product_attention gives all three with memory linear in the tokens of one sequence.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, with the mark by which Megatron sums its gradient over sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(normalized_shape=hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


def zigzag_order(length: int, ranks: int) -> Tensor:
    """Positions of a sequence in the order in which context-parallel ranks hold them.

    The sequence is cut into 2 x ranks chunks; rank r holds chunks r and 2 ranks - 1 - r, which balances causal attention.
    Shape [length]; rank r's positions are entries [r, r + 1) x length / ranks. length must divide by 2 x ranks.
    """
    chunks = torch.arange(length).chunk(2 * ranks)
    return torch.cat([torch.cat((chunks[r], chunks[2 * ranks - 1 - r])) for r in range(ranks)])


class CoreAttention(MegatronModule):
    """Causal attention over packed sequences: [t, heads, dim] queries, grouped keys and values, any context parallelism."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        has_group = pg_collection is not None and hasattr(pg_collection, "cp")
        self.cp_group = pg_collection.cp if has_group else parallel_state.get_context_parallel_group()

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict:
        """No parameters."""
        return {}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *_: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **__: Any,
    ) -> Tensor:
        """query [t, n, d] or [t, 1, n, d] of this context-parallel rank -> [t, 1, n * d] (or [t, n * d])."""
        if packed_seq_params is None:
            raise ValueError("packed sequences only: the step packs every micro-batch")
        if query.dim() == 4:
            query, key, value = (x.squeeze(1) for x in (query, key, value))
        ranks, rank = self.cp_group.size(), self.cp_group.rank()
        if ranks > 1:
            # the whole keys and values of a rank-local block: [ranks * t, n_kv, d], rank-major
            key, value = (gather_from_sequence_parallel_region(x, group=self.cp_group) for x in (key, value))
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        local = query.size(0)
        outputs = []
        for start, end in zip(bounds, bounds[1:], strict=False):
            if start == end:
                continue
            if ranks == 1:
                outputs.append(self._attend(query[start:end], key[start:end], value[start:end], None))
                continue
            own = slice(start // ranks, end // ranks)
            order = zigzag_order(end - start, ranks).to(query.device)
            rows = torch.cat(
                [torch.arange(own.start, own.stop, device=query.device) + r * local for r in range(ranks)]
            )
            mask = (
                order[rank * len(order) // ranks : (rank + 1) * len(order) // ranks, None] >= order[None, :]
            )
            outputs.append(self._attend(query[own], key[rows], value[rows], mask))
        covered = bounds[-1] // ranks
        if covered < local:  # padding behind the last sequence attends to nothing
            outputs.append(query.new_zeros(local - covered, *query.shape[1:]))
        return torch.cat(outputs).reshape(local, 1, -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))  # [1, n, s, d]
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return output[0].transpose(0, 1)
