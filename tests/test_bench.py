"""The bench: it times the loop of pretrain.py, and prints and records what it measures."""

import csv
import re
from argparse import Namespace

import pytest
import torch
from conftest import run

import pretrain
from experiments import bench

CPU = torch.device("cpu")


@pytest.mark.slow
def test_step(tmp_path):
    """Two batches, with a profile of each. The csv has what is printed."""
    text = run("step", "--rounds", "2", "--batch-size", "2", "4", "--profile",
               "--csv", tmp_path / "b.csv", script="experiments.bench", fresh=True).stdout
    with open(tmp_path / "b.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    values = {(line["what"].split()[2], line["quantity"]): float(line["value"]) for line in lines}
    for B in ("B2", "B4"):
        assert values[B, "clips per s"] > 0 and values[B, "step / bare"] > 0.5
        assert 0 < values[B, "share of matmul rate"] < 2
        assert [name for b, name in values
                if b == B and re.fullmatch(r"share of \d+ x aten::convolution_backward", name)]
    assert all(f"    {line['quantity']}: {line['value']}\n" in text for line in lines)


@pytest.mark.slow
def test_the_step_is_that_of_pretraining(monkeypatch):
    """The loop of pretrain.train gets the made-up batches, and each step changes the weights."""
    losses = []
    monkeypatch.setattr(bench.Steps, "log",
                        lambda self, loss, top1, lr: losses.append(loss.item()))
    flags = ["--arch", "r2plus1d_10", "--frames", "4", "--size", "16", "--precision", "fp32",
             "--batch-per-process", "2"]
    steps = bench.train(flags, 3, CPU)
    assert len(steps.ours) == len(steps.bare) == 3
    # One round is not counted, and one measures the memory.
    assert len(set(losses)) == len(losses) == 5
    fresh, _, _ = pretrain.build(steps.args, CPU, torch.float32)
    assert not fresh.h_v[0].weight.equal(steps.model.h_v[0].weight)


@pytest.mark.slow
def test_a_batch_in_chunks():
    """Beside the batch in chunks stand a batch of one chunk, and the batch as a whole."""
    args = Namespace(arch="r2plus1d_10", frames=4, size=16, batch_size=[8], chunk=2, rounds=2,
                     compile=False, profile=False)
    whats, values = zip(*bench.step(args))
    assert [re.search("B.*px", what)[0] for what in whats[:3]] == [
        f"B{clips} T4 16px" for clips in (2, 8, 8)]
    assert "chunks of 2" in whats[1] and "chunks" not in whats[0] + whats[2]
    assert 0.5 < values[3]["time / whole"] < 10
    for name, other in (("of one chunk", 0), ("whole", 2)):
        assert values[3][f"peak memory / {name}"] == pytest.approx(
            values[1]["peak memory, GB"] / values[other]["peak memory, GB"])


def test_peak_memory():
    """It sees an array of 400 MB, also if that is gone."""
    bench.forget_peak(CPU)
    before = bench.peak_memory(CPU)
    torch.ones(10 ** 8)
    assert 3.9e8 < bench.peak_memory(CPU) - before < 4.6e8
    bench.forget_peak(CPU)
    assert bench.peak_memory(CPU) - before < 1e8


@pytest.mark.parametrize("flags, sentence", [
    ("--rounds 1", "--rounds 1: quartiles need 2 or more"),
    *((f"--batch-size 8 10 --chunk {n}",
       f"--chunk {n}: give 2 or more clips, fewer than the batch of {B}, that divide it")
      for n, B in ((0, 8), (1, 8), (4, 10), (8, 8)))])
def test_wrong_flags_are_refused(flags, sentence, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "step", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
