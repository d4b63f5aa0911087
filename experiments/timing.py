"""Timing of functions in turn, so that a machine that slows down slows all of them down.

The peak of the memory is measured here too.
"""

import re
import statistics
import time
from pathlib import Path

import torch


def wait_for(device):
    """Wait until the device has done its work. On a CPU it has."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def forget_peak(device):
    """Forget the peak of the memory up to now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()        # the search for the fastest convolutions took the rest
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """The peak since then in bytes: of torch's memory on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def turns(functions, rounds, device=torch.device("cpu")):
    """Time functions in turn, in `rounds` rounds after one that is not counted: s, a list each."""
    times = [[] for _ in functions]
    for n in range(rounds + 1):
        for spent, function in zip(times, functions):
            wait_for(device)
            began = time.perf_counter()
            function()
            wait_for(device)
            if n:
                spent.append(time.perf_counter() - began)
    return times


def ratio(ours, bare):
    """Median of the ratios of the rounds, and a text with their quartiles."""
    r = [a / b for a, b in zip(ours, bare)]
    low, middle, high = statistics.quantiles(r, n=4)
    return middle, f"{middle:.3f} (quartiles {low:.3f} to {high:.3f}, {len(r)} rounds)"
