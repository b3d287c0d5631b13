"""`install()` makes Transformer Engine's Python layers importable and runnable on a CPU. For worker processes only.

Its compiled extension is replaced by PyTorch functions (formats, kernels); its modules see a torch.cuda with one Hopper;
the checks for a GPU in CHECKS are taken out as the modules are imported. What has no stand-in raises
NotImplementedError under its name.
"""

import contextlib
import enum
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch

from tests.te import attention, experts, formats, kernels

PACKAGES = Path(__file__).resolve().parents[2] / ".build" / "te"

# Members in order from 0; NAME=VALUE where the extension's own numbers are others. Compared with the compiled 2.20.2.
ENUMS = {
    "CommOverlapAlgo": """BULK_OVERLAP_AG BULK_OVERLAP_RS SPLIT_PIPELINED_AG_P2P SPLIT_PIPELINED_RS
        SPLIT_PIPELINED_RS_P2P ATOMIC_GEMM_RS ATOMIC_GEMM_AG_P2P ATOMIC_GEMM_RS_P2P EXTERNAL_BULK_OVERLAP_AG""",
    "CommOverlapType": "RS AG",
    "DType": """kByte=0 kInt32=2 kFloat32=4 kFloat16=5 kBFloat16=6 kFloat8E4M3=7 kFloat8E5M2=8 kFloat4E2M1=10""",
    "FP8BwdTensors": "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3",
    "FP8FwdTensors": """GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT GEMM3_INPUT
        GEMM3_WEIGHT GEMM3_OUTPUT""",
    "Float8BlockScaleTensorFormat": "GEMM_READY COMPACT INVALID",
    "NVTEQBHistogramMode": "TWO_KERNEL FUSED_ATOMIC",
    "NVTERoutingMapFormat": "BYTEMAP BITMAP_U8",
    "NVTEScalingMode": """NVTE_DELAYED_TENSOR_SCALING NVTE_MXFP8_1D_SCALING NVTE_BLOCK_SCALING_1D
        NVTE_BLOCK_SCALING_2D NVTE_NVFP4_1D_SCALING NVTE_INVALID_SCALING=100""",
    "NVTE_Bias_Type": "NVTE_NO_BIAS NVTE_PRE_SCALE_BIAS NVTE_POST_SCALE_BIAS NVTE_ALIBI",
    "NVTE_Fused_Attn_Backend": "NVTE_No_Backend=-1 NVTE_F16_arbitrary_seqlen=1 NVTE_FP8=2",
    "NVTE_Mask_Type": """NVTE_NO_MASK NVTE_PADDING_MASK NVTE_CAUSAL_MASK NVTE_PADDING_CAUSAL_MASK
        NVTE_CAUSAL_BOTTOM_RIGHT_MASK NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK""",
    "NVTE_QKV_Format": """NVTE_SBHD NVTE_BSHD NVTE_THD NVTE_BSHD_2SBHD NVTE_SBHD_2BSHD NVTE_THD_2BSHD NVTE_THD_2SBHD
        NVTE_BHSD NVTE_QKV_Format_NOT_SET""",
    "NVTE_QKV_Layout": """NVTE_SB3HD NVTE_SBH3D NVTE_SBHD_SB2HD NVTE_SBHD_SBH2D NVTE_SBHD_SBHD_SBHD NVTE_BS3HD
        NVTE_BSH3D NVTE_BSHD_BS2HD NVTE_BSHD_BSH2D NVTE_BSHD_BSHD_BSHD NVTE_T3HD NVTE_TH3D NVTE_THD_T2HD
        NVTE_THD_TH2D NVTE_THD_THD_THD NVTE_SBHD_BSHD_BSHD NVTE_BSHD_SBHD_SBHD NVTE_THD_BSHD_BSHD
        NVTE_THD_SBHD_SBHD NVTE_Paged_KV_BSHD_BSHD_BSHD NVTE_Paged_KV_BSHD_SBHD_SBHD
        NVTE_Paged_KV_SBHD_BSHD_BSHD NVTE_Paged_KV_SBHD_SBHD_SBHD NVTE_Paged_KV_THD_BSHD_BSHD
        NVTE_Paged_KV_THD_SBHD_SBHD NVTE_BHSD_BHSD_BHSD NVTE_QKV_Layout_NOT_SET""",
    "NVTE_Softmax_Type": "NVTE_VANILLA_SOFTMAX NVTE_OFF_BY_ONE_SOFTMAX NVTE_LEARNABLE_SOFTMAX",
}
_coalesced = torch.distributed._coalescing_manager
# `import *` looks for these before anything calls them
NAMED_AT_IMPORT = ("layernorm_bwd", "layernorm_fwd", "rmsnorm_bwd_add")
ATTENTION = "transformer_engine.pytorch.attention.dot_product_attention"
ON_GPU = ("query_layer.is_cuda and key_layer.is_cuda and value_layer.is_cuda", "True")
HALF = "qkv_dtype not in [torch.bfloat16, torch.float16, torch.float8_e4m3fn]"
# module -> checks for CUDA, or for what a kernel on a GPU can do, and what stands in their place
CHECKS: dict[str, tuple[tuple[str, str], ...]] = {
    "transformer_engine.pytorch.utils": (("torch.Tensor().cuda()", "torch.Tensor()"),),
    "transformer_engine.pytorch.module.base": (("if not inp.is_cuda:", "if False:"),),
    f"{ATTENTION}.dot_product_attention": (ON_GPU,),
    # No attention on a GPU is both in fp32 and over context ranks. Here one is, so that layouts can be compared to rounding.
    f"{ATTENTION}.utils": (
        (f"{HALF} or qkv_type not in (", f"{HALF} and not context_parallel or qkv_type not in ("),
    ),
    f"{ATTENTION}.backends": (
        ON_GPU,
        ("x.dtype in [torch.float16, torch.bfloat16] or isinstance(x, QuantizedTensorStorage)", "True"),
    ),
}


def install() -> None:
    """Import Transformer Engine over the stand-ins, and let the project find it whole. Before megatron is imported.

    Raises RuntimeError where it is too late, or tools/setup_te_standin.sh has not run.
    """
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron.core is imported already, without Transformer Engine")
    if not (PACKAGES / "stamp").is_file():
        raise RuntimeError("run tools/setup_te_standin.sh first")
    if str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))
    sys.meta_path.insert(0, _WithoutChecks())
    os.environ["NVTE_MASKED_SOFTMAX_FUSION"] = "0"
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no search for CUDA's libraries
    os.environ["TORCH_COMPILE_DISABLE"] = (
        "1"  # to compile its small fusions for a CPU takes longer than the tests
    )
    torch.distributed._coalescing_manager = _coalescing  # Megatron-Core takes it from there
    sys.modules["transformer_engine_torch"] = _extension()
    spec = importlib.util.find_spec("transformer_engine")
    package = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine"] = package
    importlib.import_module("transformer_engine.common").load_framework_extension = lambda framework: None
    spec.loader.exec_module(package)
    experts.install(importlib.import_module("transformer_engine.pytorch.permutation"))
    attention.install(importlib.import_module(f"{ATTENTION}.context_parallel"))
    seen = _Torch("torch")
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine.") and getattr(module, "torch", None) is torch:
            module.torch = seen
    _show_to_project()


def _coalescing(group: Any, async_ops: bool = False) -> contextlib.AbstractContextManager[Any]:
    """One after the other: gloo makes one tensor of what is coalesced, and mixes up bytes of FP8 and bf16 weights."""
    return _coalesced(group, async_ops=True) if async_ops else contextlib.nullcontext()


def _show_to_project() -> None:
    from gtpo_megatron.machine import probe

    probe.transformer_engine_parts = lambda: (
        True,
        True,
        True,
    )  # before megatron is imported, with the policy
    from gtpo_megatron.policy import platform

    platform.has_transformer_engine = lambda: True  # the real one asks for a GPU, too


def _extension() -> types.ModuleType:
    extension = _Extension("transformer_engine_torch")
    for name, members in ENUMS.items():
        setattr(extension, name, _enum(name, members))
    backends = extension.NVTE_Fused_Attn_Backend
    extension.get_fused_attn_backend = lambda *a, **k: (backends.NVTE_F16_arbitrary_seqlen, "")
    extension.get_cudnn_version = lambda: 92400
    extension.get_cublasLt_version = lambda: 130100
    for module in (attention, formats, kernels, experts):
        for name in module.__all__:
            setattr(extension, name, getattr(module, name))
    for name in NAMED_AT_IMPORT:
        setattr(extension, name, getattr(extension, name))
    return extension


def _enum(name: str, members: str) -> type[enum.IntEnum]:
    pairs = (member.partition("=") for member in members.split())
    return enum.IntEnum(name, {key: int(value or i) for i, (key, _, value) in enumerate(pairs)})


class _Extension(types.ModuleType):
    """Classes that are only named exist; functions that are not there say so when they are called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            setattr(self, name, type(name, (), {}))
            return getattr(self, name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"transformer_engine_torch.{name} has no stand-in")

        return missing


class _Cuda(types.ModuleType):
    """torch.cuda as Transformer Engine's modules see it: one Hopper."""

    is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: torch.device("cpu"))
    get_device_capability = staticmethod(lambda *a: (9, 0))
    is_current_stream_capturing = staticmethod(lambda: False)
    get_device_properties = staticmethod(
        lambda *a: types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="stand-in")
    )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _Torch(types.ModuleType):
    cuda = _Cuda("torch.cuda")
    version = types.SimpleNamespace(cuda="13.0", hip=None, __version__=torch.__version__)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _WithoutChecks(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in CHECKS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        spec.loader = _Rewritten(name, spec.origin)
        return spec


class _Rewritten(importlib.machinery.SourceFileLoader):
    def get_code(self, name: str) -> types.CodeType:
        source = self.get_source(name)
        for old, new in CHECKS[name]:
            if old not in source:
                raise RuntimeError(f"{name} no longer has the check {old!r}")
            source = source.replace(old, new)
        return compile(source, self.path, "exec", dont_inherit=True)
