"""The bench: it times the loop of pretrain.py, and prints and records what it measures."""

import csv
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import pretrain
from experiments import bench


def run_bench(*args):
    command = [sys.executable, "-m", "experiments.bench", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_step(tmp_path):
    """Two batches, with a profile of each."""
    text = run_bench("step", "--rounds", "2", "--batch-size", "2", "4", "--profile",
                     "--csv", tmp_path / "b.csv")
    line = r"^ *[\d.]+ % +\d+ x  aten::convolution_backward$"
    assert len(re.findall(line, text, re.MULTILINE)) == 2, text
    assert re.search(r"step / bare encoders: [\d.]+ .* % of the [\d.]+ of a \w+ matmul", text,
                     re.DOTALL)
    with open(tmp_path / "b.csv", newline="") as file:
        values = {(line["what"].split()[2], line["quantity"]): float(line["value"])
                  for line in csv.DictReader(file)}
    for B in ("B2", "B4"):
        assert values[B, "clips per s"] > 0 and values[B, "step / bare"] > 0.5
        assert 0 < values[B, "share of matmul rate"] < 2


def test_the_step_is_that_of_pretraining(monkeypatch):
    """The loop of pretrain.train gets the made-up batches, and each step changes the weights."""
    losses = []
    monkeypatch.setattr(bench.Steps, "log",
                        lambda self, loss, top1, lr: losses.append(loss.item()))
    flags = ["--arch", "r2plus1d_10", "--frames", "4", "--size", "16", "--precision", "fp32",
             "--batch-per-process", "2"]
    steps = bench.train(flags, 3, torch.device("cpu"))
    assert len(steps.ours) == len(steps.bare) == 3
    assert len(set(losses)) == len(losses) == 4         # with the round that is not counted
    fresh, _, _ = pretrain.build(steps.args, torch.device("cpu"), torch.float32)
    assert not fresh.h_v[0].weight.equal(steps.model.h_v[0].weight)


@pytest.mark.slow
def test_saving(tmp_path):
    """The checkpoint of the paper's model, with its momentum, has 296 MB."""
    text = run_bench("saving", "--rounds", "2", "--csv", tmp_path / "b.csv")
    assert "a checkpoint of 296 MB holds training up for" in text
    with open(tmp_path / "b.csv", newline="") as file:
        values = {line["quantity"]: float(line["value"]) for line in csv.DictReader(file)}
    assert 0 < values["s held up"] <= values["s held up, at most"]
    share = values["share of the time between two"]
    assert abs(600 * share / values["s held up"] - 1) < 0.01
