"""experiments/bench.py: what it times, counts, prints and records."""

import csv
from argparse import Namespace

import pytest
import torch
from conftest import command

import pretrain
from augment import LogMel, normalize_frames
from experiments import bench
from loss import soft_info_nce
from support.precision import autocast
from support.reading import RATE

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


@pytest.mark.slow
@pytest.mark.parametrize("precision, dtype, share", [
    ("fp32", torch.float32, 0), ("fp16", torch.float16, 2e-3)])
def test_the_counted_memory_is_that_of_a_real_step(precision, dtype, share):
    """To the byte. Half precision holds 0.1 % more: findings/fake-batchnorm-saves-half.sh."""
    args = Namespace(arch="r2plus1d_10", frames=4, size=16, batch_size=[2], chunk=None,
                     precision=precision)
    (_, counted), = bench.memory(args)
    model, optimizer, _ = pretrain.build(pretrain.parse([]), CPU, dtype)
    frames = torch.randint(0, 256, (2, 2, 4, 16, 16, 3), dtype=torch.uint8)
    waves, saved = torch.randn(2, 2, RATE), []
    audio, video = LogMel()(waves), normalize_frames(frames)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with autocast(CPU, dtype):
            outputs = model(audio, video)
        loss = soft_info_nce(*outputs)
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    for x in (*model.parameters(), *model.buffers(), audio, video):
        held.pop(x.untyped_storage().data_ptr(), None)
    loss.backward()
    optimizer.step()
    bytes_of = {"held for backward": sum(held.values()),
                "weights": sum(x.nbytes for x in model.state_dict().values()),
                "gradients": sum(x.grad.nbytes for x in model.parameters()),
                "momentum": sum(x["momentum_buffer"].nbytes for x in optimizer.state.values()),
                "frames and sound": sum(x.nbytes for x in (frames, waves, audio, video))}
    for name, expected in bytes_of.items():
        assert counted[f"{name}, GB"] * 1e9 == pytest.approx(expected, rel=share, abs=0.1), name
    assert counted["needed, GB"] == pytest.approx(sum(counted[f"{name}, GB"] for name in bytes_of))


@pytest.mark.slow
def test_memory_of_a_batch_in_chunks():
    """It holds what one chunk does, and embeds each clip once more."""
    args = dict(arch="r2plus1d_10", frames=4, size=16, precision="fp16")
    (_, one), (_, whole) = bench.memory(Namespace(**args, batch_size=[2, 8], chunk=None))
    (what, chunks), = bench.memory(Namespace(**args, batch_size=[8], chunk=2))
    assert what == "memory r2plus1d_10 B8 T4 16px float16 chunks of 2"
    held, needed, flops = "held for backward, GB", "needed, GB", "TFLOP of a clip"
    assert chunks[held] == one[held] < whole[held]
    assert one[needed] < chunks[needed] < whole[needed]
    assert whole[flops] == pytest.approx(one[flops], rel=1e-3)  # the loss is of N clips
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
def test_wrong_flags_are_refused(flags, sentence):
    status, _, errors = command(bench, "step", *flags.split())
    assert status == 2 and sentence in errors
