"""The bench: it times the loop of pretrain.py, and prints and records what it measures."""

import csv
import re
from argparse import Namespace

import pytest
import torch
from conftest import run

import pretrain
from experiments import bench
from experiments.timing import forget_peak, peak_memory


@pytest.mark.slow
def test_step(tmp_path):
    """Two batches, with a profile of each."""
    text = run("step", "--rounds", "2", "--batch-size", "2", "4", "--profile",
               "--csv", tmp_path / "b.csv", script="experiments.bench", fresh=True).stdout
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
    # One round is not counted, and one measures the memory.
    assert len(set(losses)) == len(losses) == 5
    fresh, _, _ = pretrain.build(steps.args, torch.device("cpu"), torch.float32)
    assert not fresh.h_v[0].weight.equal(steps.model.h_v[0].weight)


def test_a_batch_in_chunks():
    """Beside the batch in chunks stand a batch of one chunk, and the batch as a whole."""
    args = Namespace(arch="r2plus1d_10", frames=4, size=16, batch_size=[8], chunk=2, rounds=2,
                     compile=False, profile=False)
    texts, whats, values = zip(*bench.step(args))
    assert [re.search("B.*px", what)[0] for what in whats[:3]] == [
        f"B{clips} T4 16px" for clips in (2, 8, 8)]
    assert "chunks of 2" in whats[1] and "chunks" not in whats[0] + whats[2]
    assert 0.5 < values[3]["time / whole"] < 10
    assert values[3]["peak memory / of one chunk"] == pytest.approx(
        values[1]["peak memory, GB"] / values[0]["peak memory, GB"])
    assert "in chunks: peak memory" in texts[3] and "over the whole batch at once" in texts[3]


def test_peak_memory():
    """It sees an array of 400 MB, also if that is gone."""
    cpu = torch.device("cpu")
    forget_peak(cpu)
    before = peak_memory(cpu)
    torch.ones(10 ** 8)
    assert 3.9e8 < peak_memory(cpu) - before < 4.6e8
    forget_peak(cpu)
    assert peak_memory(cpu) - before < 1e8


@pytest.mark.slow
def test_saving(tmp_path):
    """The checkpoint of the paper's model, with its momentum, has 296 MB."""
    text = run("saving", "--rounds", "2", "--csv", tmp_path / "b.csv",
               script="experiments.bench", fresh=True).stdout
    assert "a checkpoint of 296 MB holds training up for" in text
    with open(tmp_path / "b.csv", newline="") as file:
        values = {line["quantity"]: float(line["value"]) for line in csv.DictReader(file)}
    assert 0 < values["s held up"] <= values["s held up, at most"]
    share = values["share of the time between two"]
    assert abs(600 * share / values["s held up"] - 1) < 0.01


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
