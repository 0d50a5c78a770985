"""Devices and threads."""

import torch

from apps.training.devices import describe, open_device, peak_of


def test_the_cpu_with_the_threads_that_were_asked_for() -> None:
    before = torch.get_num_threads()
    try:
        device = open_device("cpu", 2)
        assert device == torch.device("cpu")
        assert describe(device) == "CPU, 2 threads"
        open_device("cpu", None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_cpus_peak_is_not_known() -> None:
    assert peak_of(torch.device("cpu"), "float32") is None
