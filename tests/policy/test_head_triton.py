"""The Triton kernels: under Triton's interpreter against the PyTorch implementation, and compiled for an H100."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CASES = """
import torch
from gtpo_megatron.policy.head import token_statistics

generator = torch.Generator().manual_seed(0)

def run(implementation, hidden, weight, targets, **options):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    statistics = token_statistics(
        hidden, weight, targets, vocab_size=101, implementation=implementation, temperature=0.7, **options
    )
    rows = len(targets)
    loss = (statistics.logprobs * torch.linspace(-1, 2, rows)).sum()
    loss = loss + (statistics.entropy * torch.linspace(3, -1, rows)).sum() * options["entropy_grad"]
    loss.backward()
    return statistics.logprobs, statistics.entropy, hidden.grad, weight.grad

def check(rows, dtype, tolerance, bad=None, **options):
    hidden = torch.randn(rows, 16, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(128, 16, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(101, (rows,), generator=generator)
    if bad is not None:
        weight[70] = bad
    for ours, theirs in zip(run("triton", hidden, weight, targets, **options),
                            run("torch", hidden, weight, targets, **options), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
        assert bad is None or ours.isnan().any()

for entropy_grad in (False, True):
    check(13, torch.float64, 1e-12, entropy_grad=entropy_grad, token_tile=5, vocab_tile=17)
    check(13, torch.float32, 1e-5, entropy_grad=entropy_grad, token_tile=5, vocab_tile=17)
    check(13, torch.bfloat16, 2**-7, entropy_grad=entropy_grad)
    check(0, torch.float32, 0, entropy_grad=entropy_grad)
    check(3, torch.float32, 1e-5, entropy_grad=entropy_grad, bad=float("nan"), vocab_tile=17)
    check(3, torch.float32, 1e-5, entropy_grad=entropy_grad, bad=float("inf"), vocab_tile=17)

from gtpo_megatron.policy.head import triton_head
triton_head.UPDATE_BLOCK = triton_head.GRADIENT_BLOCK = 16  # several blocks a row
check(5, torch.float64, 1e-12, entropy_grad=True)
"""

# Registers a thread may take: at 4 warps a program, 128 leave room for 4 programs on a multiprocessor of 65,536.
COMPILE = r"""
import pathlib
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gtpo_megatron.policy.head import triton_head

def compile_kernel(kernel, pointers, constants):
    signature = pointers | {"columns": "i32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    dump = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([dump, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}
    assert compiled.metadata.num_warps == 4
    assert 0 < used["REG"] <= 128, used
    assert used["STACK"] == used["LOCAL"] == 0, f"registers are spilled: {used}"
    assert used["SHARED"] <= 2048, used  # a reduction over 4 warps, and what the system reserves

numbers = lambda *names: dict.fromkeys(names, "*fp32")
compile_kernel(
    triton_head._update_kernel,
    {"logits": "*fp32", "targets": "*i64", **numbers("maximum", "total", "moment", "target_logit")},
    {"BLOCK": triton_head.UPDATE_BLOCK},
)
for entropy_grad in (False, True):
    compile_kernel(
        triton_head._gradient_kernel,
        {
            "logits": "*fp32",
            "targets": "*i64",
            **numbers("log_total", "entropy", "grad_logprobs", "grad_entropy"),
            "result": "*bf16",
        },
        {"ENTROPY_GRAD": entropy_grad, "BLOCK": triton_head.GRADIENT_BLOCK},
    )
"""


@pytest.mark.parametrize(("script", "interpret"), [(CASES, "1"), (COMPILE, "0")], ids=["interpreter", "h100"])
def test_kernels(script: str, interpret: str, tmp_path) -> None:
    """In a process of its own: Triton decides on interpreting when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
