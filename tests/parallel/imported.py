"""Imported once by the server from which the gloo ranks are forked: what their jobs need, torch on one thread."""

import os

from gtpo_megatron.commands.imports import importing

os.environ["OMP_NUM_THREADS"] = "1"

with importing():
    import torch

    torch.set_num_threads(1)

    from gtpo_megatron.policy import platform

    platform.install()

    import matplotlib.backends.backend_agg  # noqa: F401  a run draws when it ends
    import pyarrow

    pyarrow.array([0])  # imports pandas, if it is installed

    import gtpo_megatron.policy.checkpoint.checkpointer
    import gtpo_megatron.train  # noqa: F401
