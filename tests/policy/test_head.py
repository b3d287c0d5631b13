"""The loss head in one process, against logits held whole."""

import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gtpo_megatron.policy import head
from gtpo_megatron.policy.head import TokenStatistics, function, tiles, token_statistics

ROWS, WIDTH, VOCABULARY, PADDED = 37, 16, 101, 128


@pytest.fixture(autouse=True)
def _memory_that_was_not_written_is_nan() -> Iterator[None]:
    """PyTorch fills `empty` with NaN where algorithms have to be deterministic: what is read unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def materialised(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, temperature: float = 1.0
) -> TokenStatistics:
    """The definition, with [R, V] logits."""
    logits = (hidden @ weight[:vocab_size].t()) / temperature
    log_probabilities = logits.log_softmax(1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(1)
    return TokenStatistics(log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1), entropy)


def make(
    dtype: torch.dtype = torch.float64, rows: int = ROWS, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(PADDED, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    targets[:2] = torch.tensor([0, VOCABULARY - 1])[:rows]
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def coefficients(rows: int = ROWS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(rows, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def gradients(statistics: TokenStatistics, *inputs: Tensor, entropy: bool = False) -> tuple[Tensor, ...]:
    for_logprobs, for_entropy = coefficients(len(statistics.logprobs), statistics.logprobs.dtype)
    loss = (for_logprobs * statistics.logprobs).sum()
    if entropy:
        loss = loss + (for_entropy * statistics.entropy).sum()
    return torch.autograd.grad(loss, inputs)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize("tile", [(None, None), (10, 17), (37, 101), (1, 1), (64, 4096)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_exact_in_float64(
    tile: tuple[int | None, int | None], temperature: float, entropy_grad: bool
) -> None:
    hidden, weight, targets = make(rows=ROWS if tile != (1, 1) else 7)
    actual = token_statistics(
        hidden,
        weight,
        targets,
        vocab_size=VOCABULARY,
        temperature=temperature,
        entropy_grad=entropy_grad,
        token_tile=tile[0],
        vocab_tile=tile[1],
    )
    expected = materialised(hidden, weight, targets, VOCABULARY, temperature)
    torch.testing.assert_close(actual.logprobs, expected.logprobs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual.entropy, expected.entropy, rtol=1e-12, atol=1e-12, check_stride=False)
    assert actual.entropy.requires_grad == entropy_grad
    for ours, theirs in zip(
        gradients(actual, hidden, weight, entropy=entropy_grad),
        gradients(expected, hidden, weight, entropy=entropy_grad),
        strict=True,
    ):
        assert relative(ours, theirs) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_float32_statistics_of_narrow_weights(dtype: torch.dtype, entropy_grad: bool) -> None:
    """Against float64 of the same (rounded) inputs: nothing but float32 rounding may be lost."""
    hidden, weight, targets = make(dtype, scale=0.5)
    exact_hidden, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    actual = token_statistics(
        hidden,
        weight,
        targets,
        vocab_size=VOCABULARY,
        entropy_grad=entropy_grad,
        token_tile=10,
        vocab_tile=17,
    )
    expected = materialised(exact_hidden, exact_weight, targets, VOCABULARY)
    assert actual.logprobs.dtype == actual.entropy.dtype == torch.float32
    assert relative(actual.logprobs, expected.logprobs) < 1e-6
    assert relative(actual.entropy, expected.entropy) < 1e-6
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8
    for ours, theirs in zip(
        gradients(actual, hidden, weight, entropy=entropy_grad),
        gradients(expected, exact_hidden, exact_weight, entropy=entropy_grad),
        strict=True,
    ):
        assert ours.dtype == dtype
        assert relative(ours, theirs) < tolerance


def test_gradients_by_finite_differences() -> None:
    hidden, weight, targets = make(rows=3)
    hidden, weight = hidden[:, :4].detach().requires_grad_(), weight[:12, :4].detach().requires_grad_()
    targets = targets % 10

    def both(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        statistics = token_statistics(
            hidden, weight, targets, vocab_size=10, entropy_grad=True, token_tile=2, vocab_tile=4
        )
        return statistics.logprobs, statistics.entropy

    # A repeated backward computes kept logits again, and rounds otherwise.
    assert torch.autograd.gradcheck(both, (hidden, weight), nondet_tol=1e-12)


def test_padded_rows_do_not_exist() -> None:
    hidden, weight, targets = make()
    with torch.no_grad():
        weight[VOCABULARY:] = 1e4
    actual = token_statistics(hidden, weight, targets, vocab_size=VOCABULARY)
    torch.testing.assert_close(actual.logprobs, materialised(hidden, weight, targets, VOCABULARY).logprobs)
    assert gradients(actual, weight)[0][VOCABULARY:].eq(0).all()


def test_large_logits_neither_overflow_nor_lose_precision() -> None:
    hidden, weight, targets = make(torch.float32, scale=200.0)
    actual = token_statistics(hidden, weight, targets, vocab_size=VOCABULARY, vocab_tile=17)
    expected = materialised(hidden.double(), weight.double(), targets, VOCABULARY)
    assert relative(actual.logprobs, expected.logprobs) < 1e-6
    assert (actual.entropy - expected.entropy).abs().max() < 1e-3
    assert (actual.entropy >= 0).all() and (actual.logprobs <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulated", [torch.float32, torch.bfloat16])
def test_accumulates_into_main_grad(dtype: torch.dtype, accumulated: torch.dtype) -> None:
    hidden, weight, targets = make(dtype)
    expected = gradients(token_statistics(hidden, weight, targets, vocab_size=VOCABULARY), weight)[0].float()
    parameter = torch.nn.Parameter(weight.detach())
    parameter.grad_added_to_main_grad = False
    main_grad = torch.ones(PADDED, WIDTH, dtype=accumulated)
    for _ in range(2):
        statistics = token_statistics(
            hidden,
            parameter,
            targets,
            vocab_size=VOCABULARY,
            token_tile=10,
            vocab_tile=17,
            main_grad=main_grad,
        )
        placeholder = gradients(statistics, parameter)[0]
    assert parameter.grad_added_to_main_grad
    assert placeholder.shape == parameter.shape and placeholder.dtype == dtype
    narrow = torch.bfloat16 in (dtype, accumulated)
    assert relative(main_grad.float(), 1 + 2 * expected) < (2**-6 if narrow else 1e-6)


def test_placeholder_is_zero_where_it_will_be_added() -> None:
    hidden, weight, targets = make()
    parameter = torch.nn.Parameter(weight.detach())
    parameter.grad_added_to_main_grad = False
    parameter.zero_out_wgrad = True
    statistics = token_statistics(
        hidden, parameter, targets, vocab_size=VOCABULARY, main_grad=torch.zeros_like(parameter)
    )
    assert gradients(statistics, parameter)[0].eq(0).all()


def test_no_placeholder_without_the_attribute() -> None:
    hidden, weight, targets = make()
    main_grad = torch.zeros_like(weight)
    statistics = token_statistics(hidden, weight, targets, vocab_size=VOCABULARY, main_grad=main_grad)
    statistics.logprobs.sum().backward()
    assert weight.grad is None and main_grad.abs().sum() > 0


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, weight, targets = make()
    frozen = token_statistics(hidden, weight.detach(), targets, vocab_size=VOCABULARY)
    free = token_statistics(hidden, weight, targets, vocab_size=VOCABULARY)
    assert torch.equal(gradients(frozen, hidden)[0], gradients(free, hidden)[0])
    assert not token_statistics(
        hidden.detach(), weight.detach(), targets, vocab_size=VOCABULARY
    ).logprobs.requires_grad


def test_second_backward_computes_kept_logits_again() -> None:
    hidden, weight, targets = make()
    options = {"vocab_size": VOCABULARY, "vocab_tile": 17, "temperature": 0.6}
    statistics = token_statistics(hidden, weight, targets, **options)
    first = torch.autograd.grad(statistics.logprobs.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(statistics.logprobs.sum(), (hidden, weight))
    for once, again in zip(first, second, strict=True):
        torch.testing.assert_close(once, again)


@pytest.mark.parametrize(
    ("rows", "again"),
    [
        (WIDTH - 1, 0),  # logits take no more than the gradient: the backward multiplies none again
        (2 * WIDTH, 4),  # two of six tiles find room
    ],
)
def test_logits_wait_in_the_memory_of_the_weights_gradient(
    rows: int, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiles.WORKSPACE_BYTES, "cpu", 0)
    products: list[tuple[int, ...]] = []

    def multiply(left: Tensor, right: Tensor, out: Tensor, *, scale: float = 1.0) -> None:
        products.append(tuple(out.shape))
        tiles.multiply(left, right, out, scale=scale)

    monkeypatch.setattr(function, "multiply", multiply)
    hidden, weight, targets = make(rows=rows)
    statistics = token_statistics(
        hidden, weight, targets, vocab_size=VOCABULARY, token_tile=rows, vocab_tile=17
    )
    shapes = [(rows, min(17, VOCABULARY - start)) for start in range(0, VOCABULARY, 17)]
    assert products == shapes
    products.clear()
    found = gradients(statistics, hidden, weight)
    assert sum(shape[0] == rows for shape in products) == again
    expected = gradients(materialised(hidden, weight, targets, VOCABULARY), hidden, weight)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours, theirs) < 1e-12


@pytest.mark.parametrize("width", [15, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_waiting_logits_may_share_an_odd_number_of_halves(
    width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two numbers of a bfloat16 gradient hold one logit, and 101 x 15 of them are odd."""
    found = []
    for workspace in (0, 1 << 20):  # logits wait in the gradient's memory alone; all are kept beside it
        monkeypatch.setitem(tiles.WORKSPACE_BYTES, "cpu", workspace)
        hidden, weight, targets = make(dtype)
        hidden, weight = (x[:, :width].detach().requires_grad_() for x in (hidden, weight))
        statistics = token_statistics(
            hidden, weight, targets, vocab_size=VOCABULARY, token_tile=5, vocab_tile=17
        )
        found.append(gradients(statistics, hidden, weight))
    for ours, theirs in zip(*found, strict=True):
        assert ours.isfinite().all() and relative(ours, theirs) < (2e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("tiles_kept", [0, 1, 2, 6])
def test_as_many_tiles_are_kept_as_the_workspace_has_room_for(
    tiles_kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a `main_grad` no memory is lent: what the backward does not multiply again was kept beside the workspace."""
    tile, count = (
        ROWS * 17 * 8,
        6,
    )  # bytes of a tile of 17 columns; 101 columns are cut into six, the last of 16
    monkeypatch.setitem(tiles.WORKSPACE_BYTES, "cpu", (2 + tiles_kept) * tile)
    products = 0

    def multiply(left: Tensor, right: Tensor, out: Tensor, *, scale: float = 1.0) -> None:
        nonlocal products
        products += 1
        tiles.multiply(left, right, out, scale=scale)

    monkeypatch.setattr(function, "multiply", multiply)
    hidden, weight, targets = make()
    main_grad = torch.zeros_like(weight)
    statistics = token_statistics(
        hidden, weight, targets, vocab_size=VOCABULARY, main_grad=main_grad, token_tile=ROWS, vocab_tile=17
    )
    assert products == count
    gradients(statistics, hidden)
    assert products == count + count - tiles_kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_tokens(dtype: torch.dtype) -> None:
    hidden, weight, targets = make(dtype, rows=0)
    main_grad = torch.ones_like(weight)
    for buffer in (None, main_grad):
        statistics = token_statistics(hidden, weight, targets, vocab_size=VOCABULARY, main_grad=buffer)
        assert statistics.logprobs.shape == statistics.entropy.shape == (0,)
        statistics.logprobs.sum().backward()
    assert hidden.grad.shape == (0, WIDTH)
    assert weight.grad.eq(0).all() and main_grad.eq(1).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 60])
def test_bad_logits_are_visible(bad: float, where: int) -> None:
    hidden, weight, targets = make()
    with torch.no_grad():
        hidden[3] = hidden[3].abs()
        weight[where] = bad
    statistics = token_statistics(
        hidden, weight, targets, vocab_size=VOCABULARY, token_tile=10, vocab_tile=17
    )
    assert statistics.entropy[3].isnan()
    hidden_gradient, weight_gradient = gradients(statistics, hidden, weight)
    assert hidden_gradient[3].isnan().any()
    if bad != -math.inf:
        assert statistics.logprobs[3].isnan() and weight_gradient.isnan().any()


@pytest.mark.parametrize("bad", [-1, VOCABULARY, PADDED])
def test_id_outside_the_vocabulary(bad: int) -> None:
    hidden, weight, targets = make()
    targets[5] = bad
    with pytest.raises(ValueError, match=rf"targets\[5\]: id {bad} .* \[0, {VOCABULARY}\)"):
        token_statistics(hidden, weight, targets, vocab_size=VOCABULARY)


def test_id_outside_the_vocabulary_is_nan_where_ids_are_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, where looking at them would wait for it."""
    monkeypatch.setattr(head, "_check", lambda *_: None)
    hidden, weight, targets = make()
    expected = token_statistics(hidden, weight, targets, vocab_size=VOCABULARY).logprobs.tolist()
    for row, bad in ((5, -1), (6, VOCABULARY), (7, PADDED), (8, 10**6)):
        targets[row], expected[row] = bad, math.nan
    actual = token_statistics(hidden, weight, targets, vocab_size=VOCABULARY)
    assert actual.logprobs.tolist() == pytest.approx(expected, nan_ok=True, abs=0)
    assert actual.entropy.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(ROWS, WIDTH + 1, dtype=torch.float64)}, "hidden and weight: expected"),
        ({"hidden": torch.zeros(ROWS, WIDTH)}, "types differ"),
        ({"targets": torch.zeros(ROWS - 1, dtype=torch.int64)}, "targets: expected int64 of shape"),
        ({"targets": torch.zeros(ROWS, dtype=torch.int32)}, "targets: expected int64"),
        ({"vocab_size": PADDED + 1}, "cannot hold a vocabulary"),
        ({"temperature": 0.0}, "temperature: 0.0"),
        ({"main_grad": torch.zeros(3, WIDTH)}, "main_grad: shape"),
        ({"implementation": "numpy"}, "implementation: 'numpy'"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    hidden, weight, targets = make()
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, "vocab_size": VOCABULARY} | change
    with pytest.raises(ValueError, match=message):
        token_statistics(**arguments)


class PeakStorage(TorchDispatchMode):
    """The most bytes alive at once in storages that operations inside have made."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        known = {
            _storage(tensor)._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, Tensor)
                and (key := _storage(tensor)._cdata) not in known | self.alive.keys()
            ):
                self.alive[key] = _storage(tensor).nbytes()
                weakref.finalize(_storage(tensor), self.alive.pop, key)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_weight", ["its own", "main_grad", "none"])
def test_memory_is_a_workspace_and_no_plane(
    dtype: torch.dtype, of_weight: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = 1 << 20
    monkeypatch.setitem(tiles.WORKSPACE_BYTES, "cpu", workspace)
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", workspace // 4)
    rows, width, vocabulary = 512, 64, 9000
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width).to(dtype).requires_grad_(of_weight != "none")
    main_grad = torch.zeros_like(weight) if of_weight == "main_grad" else None
    targets = torch.randint(vocabulary, (rows,))
    with PeakStorage() as storages:
        statistics = token_statistics(hidden, weight, targets, vocab_size=vocabulary, main_grad=main_grad)
        statistics.logprobs.sum().backward()
    own = weight.nbytes if of_weight == "its own" else 0
    assert weight.nbytes > workspace
    gradients_bytes = own + 2 * rows * width * 4 + hidden.nbytes
    per_token = 256
    assert workspace // 2 < storages.peak < workspace + gradients_bytes + rows * per_token


@pytest.mark.parametrize("vocab_tile", [None, 17])
def test_bfloat16_factors_have_float32_statistics(vocab_tile: int | None) -> None:
    hidden, weight, targets = make(torch.bfloat16, scale=2.0)
    actual = token_statistics(hidden, weight, targets, vocab_size=VOCABULARY, vocab_tile=vocab_tile)
    exact = materialised(hidden.double(), weight.double(), targets, VOCABULARY)
    # the products of bfloat16 numbers are exact in float32; what rounds are the sums over the width and the vocabulary
    largest = (hidden.double() @ weight.double().t()).abs().max().item()
    bound = torch.finfo(torch.float32).eps * (WIDTH * largest + math.log(VOCABULARY) * 8)
    assert bound < 1e-3  # a sum in bfloat16 is off by more
    assert (actual.logprobs - exact.logprobs).abs().max().item() <= bound
    assert (actual.entropy - exact.entropy).abs().max().item() <= bound * (1 + math.log(VOCABULARY))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (300, 576), (8192, 2048)])
@pytest.mark.parametrize("vocab_rows", [1, 300, 151_936])
def test_chosen_tiles_fit_in_the_workspace(
    dtype: torch.dtype, rows: int, width: int, vocab_rows: int
) -> None:
    hidden = torch.empty(rows, width, dtype=dtype)
    item = tiles.statistics_dtype(hidden).itemsize
    plan = tiles.plan_tiles(hidden, vocab_rows, None, None)
    logits = plan.token_tile * plan.vocab_tile * item
    converted = 2 * width * plan.vocab_tile * item if dtype == torch.bfloat16 else 0
    assert 1 <= plan.token_tile <= rows and 1 <= plan.vocab_tile <= vocab_rows
    assert logits <= tiles.CPU_TILE_BYTES
    assert 2 * logits + converted + plan.kept_bytes <= tiles.WORKSPACE_BYTES["cpu"]
    # and are not needlessly small: a larger tile would leave the cache or the workspace, or there are no more columns
    full = logits > tiles.CPU_TILE_BYTES / 2 or 2 * logits + converted > tiles.WORKSPACE_BYTES["cpu"] / 2
    assert plan.vocab_tile == vocab_rows or full
    assert plan.kept_bytes > 0
