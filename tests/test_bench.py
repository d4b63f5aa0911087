"""experiments/bench.py: what it times, prints and records."""

import csv

import pytest
import torch
from conftest import command

from experiments import bench

CPU = torch.device("cpu")


@pytest.mark.slow
def test_step(tmp_path, monkeypatch):
    """Each step changes the weights. The csv has what is printed."""
    done, losses, train = [], [], bench.train
    monkeypatch.setattr(bench, "train", lambda *words: done.append(train(*words)) or done[-1])
    monkeypatch.setattr(bench.Steps, "log", lambda self, loss, **_: losses.append(loss.item()))
    flags = "--rounds 5 --size 16 --batch-size 4 --chunk 2 --precision fp32 --profile"
    status, text, _ = command(bench, "step", *flags.split(), "--csv", tmp_path / "b")
    assert status == 0 and text.count("aten::convolution_backward") >= 3
    assert [(len(steps.ours), len(steps.bare)) for steps in done] == [(5, 5)] * 3
    # One round is not counted, one measures the memory, and one is profiled.
    assert len(set(losses)) == len(losses) == 3 * (5 + 3)
    found = {}
    for line in csv.DictReader((tmp_path / "b").read_text().splitlines()):
        assert f"    {line['quantity']}: {line['value']}\n" in text
        found.setdefault(line["what"], {})[line["quantity"]] = float(line["value"])
    assert list(found) == [
        "step r2plus1d_10 B2 T4 16px float32", "step r2plus1d_10 B4 T4 16px float32 chunks of 2",
        "step r2plus1d_10 B4 T4 16px float32", "step r2plus1d_10 B4 in chunks of 2"]
    one, chunked, whole, ratios = found.values()
    assert 0.5 < ratios["time / whole"] < 10
    for name, other in (("of one chunk", one), ("whole", whole)):
        ratio = chunked["peak memory, GB"] / other["peak memory, GB"]
        assert ratios[f"peak memory / {name}"] == pytest.approx(ratio, rel=2e-3)
    for step, clips in ((one, 2), (chunked, 4), (whole, 4)):
        assert step["clips per s"] == pytest.approx(clips / step["s"], rel=1e-2)
        assert step["step / bare in chunks"] > 0.5  # the median of the rounds
        assert 0 < step["share of matmul rate"] < 2


def test_peak_memory():
    """It sees an array of 400 MB, also if that is gone."""
    bench.forget_peak(CPU)
    before = bench.peak_memory(CPU)
    torch.ones(10 ** 8)
    assert 3.9e8 < bench.peak_memory(CPU) - before < 4.6e8
    bench.forget_peak(CPU)
    assert bench.peak_memory(CPU) - before < 1e8


@pytest.mark.parametrize("flags, sentence", [
    ("--rounds 1", "--rounds: '1' is not a whole number of 2 or more"),
    ("--batch-size 8 10 --chunk 4", "--chunk 4 does not divide every --batch-size")])
def test_wrong_flags_are_refused(flags, sentence):
    status, _, errors = command(bench, "step", *flags.split())
    assert status == 2 and sentence in errors
