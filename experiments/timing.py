"""Timing of functions in turn, so that a machine that slows down slows all of them down."""

import statistics
import time

import torch


def wait_for(device):
    """Wait until the device has done its work. On a CPU it has."""
    if device.type == "cuda":
        torch.cuda.synchronize()


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
