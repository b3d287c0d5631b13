"""The loss head's two implementations on a GPU: parity with logits held whole, kept within memory bounds."""

import pytest
import torch
from torch import Tensor

from gtpo_megatron.policy.head import tiles, token_statistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
ROWS, WIDTH, VOCABULARY, PADDED = 300, 256, 5_000, 5_120


def make(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(PADDED, WIDTH, device="cuda", dtype=torch.float64) / 8).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (ROWS,), device="cuda")
    return hidden, weight, targets, torch.randn(2, ROWS, device="cuda", dtype=torch.float64)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach() - expected.detach()).abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize(
    ("dtype", "statistics_tolerance", "gradient_tolerance"),
    [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 1e-6, 2**-7), (torch.float64, 1e-12, 1e-12)],
)
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_parity(
    implementation: str,
    dtype: torch.dtype,
    statistics_tolerance: float,
    gradient_tolerance: float,
    entropy_grad: bool,
    accumulate: bool,
) -> None:
    """Against float64 of the same inputs."""
    hidden, weight, targets, (for_logprobs, for_entropy) = make(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    main_grad = torch.zeros(PADDED, WIDTH, device="cuda", dtype=wide) if accumulate else None
    actual = token_statistics(
        hidden,
        weight,
        targets,
        vocab_size=VOCABULARY,
        temperature=0.7,
        entropy_grad=entropy_grad,
        implementation=implementation,
        token_tile=128,
        vocab_tile=768,
        main_grad=main_grad,
    )
    exact_hidden, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    log_probabilities = (exact_hidden @ exact_weight[:VOCABULARY].t() / 0.7).log_softmax(1)
    logprobs = log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(1)
    for result, expected in ((actual.logprobs, logprobs), (actual.entropy, entropy)):
        assert relative(result, expected) < statistics_tolerance

    for result, expected in ((actual.logprobs, actual.entropy), (logprobs, entropy)):
        loss = (for_logprobs * result).sum()
        (loss + (for_entropy * expected).sum() if entropy_grad else loss).backward()
    assert relative(hidden.grad, exact_hidden.grad) < gradient_tolerance
    assert relative(main_grad if accumulate else weight.grad, exact_weight.grad) < gradient_tolerance


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_memory_is_a_workspace_and_no_plane(implementation: str) -> None:
    """bfloat16 of a real size: whole logits would take 2.3 GiB in bfloat16 alone."""
    rows, width, vocabulary = 8192, 1024, 151_936
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    main_grad = torch.zeros(vocabulary, width, device="cuda")
    targets = torch.randint(vocabulary, (rows,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_statistics(
        hidden,
        weight,
        targets,
        vocab_size=vocabulary,
        implementation=implementation,
        main_grad=main_grad,
    ).logprobs.sum().backward()
    of_hidden = rows * width * (4 + 2)
    allowed = tiles.WORKSPACE_BYTES["cuda"] + of_hidden + rows * 256 + (64 << 20)  # cuBLAS's own workspace
    assert torch.cuda.max_memory_allocated() - before < allowed


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_id_outside_the_vocabulary_is_visible(implementation: str) -> None:
    hidden, weight, targets, _ = make(torch.float32)
    targets[3] = VOCABULARY
    statistics = token_statistics(
        hidden, weight, targets, vocab_size=VOCABULARY, implementation=implementation
    )
    assert statistics.logprobs.isnan().nonzero().flatten().tolist() == [3]
