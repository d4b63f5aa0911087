"""The bench: it times the loop of pretrain.py, and prints and records what it measures."""

import csv
import re
from argparse import Namespace

import pytest
import torch
from conftest import command

import pretrain
from augment import LogMel, normalize_frames
from experiments import bench
from loss import soft_info_nce
from support.processes import autocast
from support.reading import RATE

CPU = torch.device("cpu")


@pytest.mark.slow
def test_step(tmp_path):
    """Beside the batch in chunks stand a batch of one chunk, and the batch as a whole. The csv has
    what is printed."""
    flags = ["step", "--rounds", "5", "--frames", "4", "--size", "16", "--batch-size", "4"]
    status, text, _ = command(bench, *flags, "--chunk", "2", "--profile", "--csv", tmp_path / "b")
    assert status == 0 and text.count("aten::convolution_backward") >= 3
    with open(tmp_path / "b", newline="") as file:
        lines = list(csv.DictReader(file))
    assert all(f"    {line['quantity']}: {line['value']}\n" in text for line in lines)
    found = {}
    for line in lines:
        found.setdefault(line["what"], {})[line["quantity"]] = float(line["value"])
    whats, values = list(found), list(found.values())
    assert [re.search("B.*px", what)[0] for what in whats[:3]] == [
        f"B{clips} T4 16px" for clips in (2, 4, 4)]
    assert "chunks of 2" in whats[1] and "chunks" not in whats[0] + whats[2]
    assert 0.5 < values[3]["time / whole"] < 10
    for name, other in (("of one chunk", 0), ("whole", 2)):
        assert values[3][f"peak memory / {name}"] == pytest.approx(
            values[1]["peak memory, GB"] / values[other]["peak memory, GB"], rel=2e-3)
    for step, clips in zip(values, (2, 4, 4)):
        assert step["clips per s"] == pytest.approx(clips / step["s"], rel=1e-2)
        assert step["step / bare in chunks"] > 0.5      # the median of the rounds
        assert 0 < step["share of matmul rate"] < 2


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


@pytest.mark.slow
@pytest.mark.parametrize("precision, dtype, share", [
    ("fp32", torch.float32, 0), ("fp16", torch.float16, 2e-3)])
def test_the_counted_memory_is_that_of_a_real_step(precision, dtype, share):
    """To the byte: tensors with values hold as much for the backward pass as those without. In half
    precision they hold 0.1 % more (findings/fake-batchnorm-saves-half.sh)."""
    (what, counted), = bench.memory(Namespace(arch="r2plus1d_10", frames=4, size=16, batch_size=[2],
                                              chunk=None, precision=precision))
    assert what == f"memory r2plus1d_10 B2 T4 16px {str(dtype)[6:]}"
    model, optimizer, _ = pretrain.build(pretrain.parse([]), CPU, dtype)
    frames = torch.randint(0, 256, (2, 2, 4, 16, 16, 3), dtype=torch.uint8)
    waves, saved = torch.randn(2, 2, RATE), []
    audio, video = LogMel()(waves), normalize_frames(frames)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with autocast(CPU, dtype):
            outputs = model(audio, video)
        loss = soft_info_nce(*outputs)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    for x in (*model.parameters(), *model.buffers(), audio, video):
        storages.pop(x.untyped_storage().data_ptr(), None)
    loss.backward()
    optimizer.step()
    bytes_of = {"held for backward": sum(storages.values()),
                "weights": sum(x.nbytes for x in model.state_dict().values()),
                "gradients": sum(x.grad.nbytes for x in model.parameters()),
                "momentum": sum(x["momentum_buffer"].nbytes for x in optimizer.state.values()),
                "frames and sound": 2 * 2 * (4 * 16 * 16 * 3 * (1 + 4) + 4 * (RATE + 40 * 101))}
    for name, expected in bytes_of.items():
        error = max(0.1, share * expected)
        assert counted[f"{name}, GB"] * 1e9 == pytest.approx(expected, abs=error), name
    parts = sum(counted[f"{name}, GB"] for name in bytes_of)
    assert counted["needed, GB"] == pytest.approx(parts)


@pytest.mark.slow
def test_memory_of_a_batch_in_chunks():
    """It holds what one chunk does, and embeds each clip once more."""
    args = Namespace(arch="r2plus1d_10", frames=4, size=16, precision="fp16")
    (_, one), (_, whole) = bench.memory(Namespace(**vars(args), batch_size=[2, 8], chunk=None))
    (what, chunks), = bench.memory(Namespace(**vars(args), batch_size=[8], chunk=2))
    assert what == "memory r2plus1d_10 B8 T4 16px float16 chunks of 2"
    held = "held for backward, GB"
    assert chunks[held] == one[held] < whole[held]
    assert one["needed, GB"] < chunks["needed, GB"] < whole["needed, GB"]
    flops = "TFLOP of a clip"
    assert whole[flops] == pytest.approx(one[flops], rel=1e-3)     # the loss is of N clips
    assert chunks[flops] / one[flops] == pytest.approx(4 / 3, abs=0.02)


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
def test_wrong_flags_are_refused(flags, sentence, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "step", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
