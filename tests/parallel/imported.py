"""Imported once by the server from which the gloo ranks are forked: what their jobs need, torch on one thread."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

from gtpo_megatron.policy import platform  # noqa: E402

platform.install()

import gtpo_megatron.policy.checkpoint.checkpointer  # noqa: E402
import gtpo_megatron.policy.optimizer  # noqa: E402, F401
