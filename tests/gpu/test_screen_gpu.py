"""The screening's checks on this machine's GPUs."""

import pytest
import torch

from gtpo_megatron.machine import screen

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_gpus_in_order_compute_and_sum() -> None:
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    screen.check_products(devices)
    screen.check_sum_on_gpus(devices)
