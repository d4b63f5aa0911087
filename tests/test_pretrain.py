"""The training script: its schedule, its flags, its checkpoints, and what it says to bad input."""

import argparse
import ast
import json
import math
import subprocess
import sys

import pytest
import torch
import torchvision
from conftest import ROOT, make_video

import pretrain
from augment import LogMel
from loss import soft_info_nce
from prepare import scan
from pretrain import lr_at, parse, precision

SMALL = ["--arch", "r2plus1d_10", "--size", "16", "--frames", "4", "--fps", "8", "--batch-size", "4", "--epochs", "4",
         "--warmup", "1", "--workers", "1", "--precision", "fp32"]


def run(*args, processes=1, script="pretrain.py", check=True, cwd=ROOT):
    launch = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                      f"--nproc_per_node={processes}"]
    done = subprocess.run([*launch, str(script), *map(str, args)], cwd=cwd, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_learning_rate():
    """§3.1: 0.064 -> 0.64 in 10 epochs, cosine to 0.10 at epoch 100, per step."""
    lr = lambda step: lr_at(step / 451, warmup=10, epochs=100, peak=0.64)
    assert lr(0) == pytest.approx(0.064)
    assert lr(2255) == pytest.approx((0.064 + 0.64) / 2)
    assert lr(4510) == pytest.approx(0.64)
    assert lr(4510 + 45 * 451) == pytest.approx((0.64 + 0.10) / 2)
    assert lr(45100) == pytest.approx(0.10)
    rates = [lr(step) for step in range(0, 45101, 50)]
    assert rates == sorted(rates[:91]) + sorted(rates[91:], reverse=True)
    assert lr_at(0, 0, 3, 1.0) == 1.0


def test_defaults_are_the_papers():
    args = parse(["--data", "x"])
    paper = dict(max_speed=4, epochs=100, warmup=10, batch_size=8, lr=0.64, arch="r2plus1d_18", mapping="identity",
                 affinity="clip", size=128, eta=0.07, frames=30, fps=30, weight_decay=1e-5)
    assert {name: getattr(args, name) for name in paper} == paper
    demo = parse([])
    assert {name: getattr(demo, name) for name in pretrain.DEMO} == pretrain.DEMO
    assert parse(["--epochs", "3"]).epochs == 3           # what is asked for outranks the settings of the built-in set


def test_every_flag_is_read_and_says_its_default():
    source = (ROOT / "pretrain.py").read_text()
    read = {node.attr for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "args"}
    parser = []
    init = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = lambda self, *a, **k: parser.append(self) or init(self, *a, **k)
    try:
        names = vars(parse(["--data", "x"])).keys()
    finally:
        argparse.ArgumentParser.parse_args = init
    assert names - read == set()
    for action in parser[0]._actions:
        assert "§" in action.help or "paper silent" in action.help or "(" in action.help or action.dest == "help", action.dest


@pytest.mark.parametrize("flags,sentence", [
    (["--bogus"], "unrecognized arguments: --bogus"), (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
    (["--affinity", "both"], "invalid choice: 'both'"), (["--max-speed", "0"], "--max-speed 0: 1 or more"),
    (["--eta", "0"], "--eta 0.0: more than 0"), (["--warmup", "9", "--epochs", "3"], "--warmup 9 is longer than --epochs 3"),
    (["--mapping", "mlp", "--affinity", "none"], "--mapping mlp has nothing to learn from"),
    (["--mapping", "linear", "--detach-affinity"], "--mapping linear has nothing to learn from")])
def test_bad_flags(flags, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(flags)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_precision_by_capability(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for bf16 in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert precision("auto", cpu)[0] == (torch.bfloat16 if bf16 else torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    for capability, dtype in (((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert precision("auto", gpu)[0] == dtype
    assert precision("fp32", gpu)[0] == torch.float32


@pytest.fixture(scope="module")
def trained(tree, tmp_path_factory):
    """One process, 10 clips: 2 steps an epoch, 4 epochs."""
    out = tmp_path_factory.mktemp("runs") / "one"
    return out, run("--data", tree, "--out", out, *SMALL)


def test_start_prints_the_effective_numbers(trained):
    text = trained[1].stdout
    for part in ("1 process(es) on cpu, float32 (as asked)", "10 clips (0 left out), global batch 4", "6 negatives per query",
                 "2 steps an epoch, 8 steps in all", "learning rate 0.0005 -> 0.005 -> 0.0007813", "times 4/512"):
        assert part in text, part


def test_log_and_files(trained):
    out, _ = trained
    head, *events = log_of(out)
    assert head["args"]["max_speed"] == 4 and head["processes"] == 1
    assert [event["step"] for event in events] == [8]
    assert math.isfinite(events[0]["loss"]) and events[0]["replaced"] == 0 and 0 <= events[0]["wait"] <= 1
    assert not list(out.glob("*.part"))
    theirs = torchvision.models.resnet18(weights=None)
    audio = torch.load(out / "audio_encoder.pt", weights_only=True)
    assert theirs.layer4[0].conv1.weight.shape == audio["layer4.0.conv1.weight"].shape
    from models import video_encoder
    video_encoder("r2plus1d_10").load_state_dict(torch.load(out / "video_encoder.pt", weights_only=True))


def here(monkeypatch, *args):
    """The script in this process: its exit status."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, args)])
    try:
        pretrain.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_same_command_again_has_nothing_to_do(trained, tree, monkeypatch, capsys):
    out, _ = trained
    before = (out / "log.jsonl").read_text(), (out / "checkpoint.pt").stat().st_mtime_ns
    assert here(monkeypatch, "--data", tree, "--out", out, *SMALL) == 0
    assert "trained to its last step already" in capsys.readouterr().out
    assert before == ((out / "log.jsonl").read_text(), (out / "checkpoint.pt").stat().st_mtime_ns)


def test_other_settings_or_data_are_refused(trained, tree, tmp_path, monkeypatch, capsys):
    out, _ = trained
    before = (out / "checkpoint.pt").read_bytes()
    assert here(monkeypatch, "--data", tree, "--out", out, *SMALL, "--eta", "0.1") == 1
    assert "made with other settings (eta 0.07 there, 0.1 here): give those or another --out" in capsys.readouterr().err
    assert (out / "checkpoint.pt").read_bytes() == before
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    torch.save(state | {"clips": "9 clips, sum 1"}, tmp_path / "checkpoint.pt")      # a file was added since
    assert here(monkeypatch, "--data", tree, "--out", tmp_path, *SMALL) == 1
    assert "(data set 9 clips, sum 1 there, 10 clips, sum " in capsys.readouterr().err


def test_bad_data(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    make_video(tmp_path / "few" / "train" / "c" / "a.mp4", 2)
    make_video(tmp_path / "few" / "train" / "c" / "silent.mp4", 2, tone=None)
    for data, flags, sentence in (
            ("gone", [], "no folder"), ("gone.csv", [], "no such manifest"), ("empty", [], "no video in"),
            ("few", [], "1 usable clips (1 left out) do not fill one global batch of 4: give a smaller --batch-size or more data"),
            ("few", ["--split", "val"], "has no 'val' part, it has 'train'"),
            ("few", ["--batch-size", "1"], "a global batch of 1 has no negatives")):
        status = here(monkeypatch, "--data", tmp_path / data, "--out", tmp_path / "out", *SMALL, *flags)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert status == 1 and len(errors) == 1 and sentence in errors[0], errors


def test_files_that_fail_later(tmp_path):
    """Of 12 scanned files some are damaged before training: replaced and counted; too many of them stop the run."""
    for n in range(12):
        make_video(tmp_path / "d" / "c" / f"{n}.mp4", 1.5, 10)
    scan.write(scan.scan(tmp_path / "d"), tmp_path / "scan" / "manifest.csv")
    good = (tmp_path / "d" / "c" / "0.mp4").read_bytes()
    (tmp_path / "d" / "c" / "0.mp4").write_bytes(b"gone bad")
    kept = ["--data", tmp_path / "scan" / "manifest.csv", *SMALL]
    done = run(*kept, "--out", tmp_path / "some", "--max-failures", "0.5")
    assert log_of(tmp_path / "some")[-1]["replaced"] > 0 and "replaced: " in done.stderr and "0.mp4: Invalid data" in done.stderr
    done = run(*kept, "--out", tmp_path / "many", "--max-failures", "0.01", check=False)
    assert done.returncode == 1 and "had to be replaced, more than --max-failures 0.01" in done.stderr
    for path in (tmp_path / "d" / "c").iterdir():
        path.write_bytes(good[:200])
    done = run(*kept, "--out", tmp_path / "all", check=False)
    errors = [line for line in done.stderr.splitlines() if "10 files in a row failed, the last: " in line and "error" in line]
    assert done.returncode == 1 and len(errors) == 1 and "Traceback" not in done.stderr


def test_processes_that_see_different_checkpoints_stop(tree, tmp_path):
    """As on nodes whose --out is not shared: one goes on from step 10, the other starts anew."""
    script = tmp_path / "unshared.py"
    script.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport pretrain\n"
                      "pretrain.resume = lambda *_: ((0, 0, 10 * (os.environ['RANK'] == '0')), [])\npretrain.main()\n")
    done = run("--data", tree, "--out", tmp_path / "o", *SMALL, "--batch-size", "2", processes=2, script=script, check=False)
    assert done.returncode != 0 and "error: processes see different checkpoints or data: is --out" in done.stderr


@pytest.mark.parametrize("flags,keywords", [
    ([], {}), (["--eta", "0.2"], {"eta": 0.2}), (["--affinity", "view"], {"affinity": "view"}),
    (["--affinity-temperature", "0.1"], {"affinity_temperature": 0.1}), (["--one-way"], {"symmetric": False}),
    (["--raw-affinity"], {"normalize": False}), (["--detach-affinity"], {"detach": True})])
def test_flags_of_the_objective_reach_it(flags, keywords):
    """A network of free numbers: loss and gradient of one step are those of soft_info_nce with that keyword alone."""
    g = torch.Generator().manual_seed(0)
    fixed = [torch.rand(4, 2, 8, generator=g) for _ in range(4)]

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x = torch.nn.ParameterList(torch.nn.Parameter(x.clone()) for x in fixed)

        def forward(self, video, audio):
            assert video.shape == (4, 2, 3, 1, 16, 16) and audio.shape == (4, 2, 1, 40, 11)
            return tuple(self.x)

    net, args = Net(), parse(["--data", "x", *flags])
    optimizer, scaler = torch.optim.SGD(net.parameters(), lr=1.0), torch.amp.GradScaler("cpu", enabled=False)
    loss, z_a, z_v = pretrain.objective(net, LogMel(), torch.zeros(4, 2, 1, 16, 16, 3, dtype=torch.uint8),
                                        torch.zeros(4, 2, 2400), args, torch.float32)
    assert not pretrain.descend(loss, optimizer, scaler)
    y_v, y_a, x_v, x_a = (x.clone().requires_grad_() for x in fixed)
    expected = soft_info_nce(y_a, y_v, x_a, x_v, **keywords)
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach())
    for moved, start, x in zip(net.x, fixed, (y_v, y_a, x_v, x_a)):
        torch.testing.assert_close(start - moved.detach(), torch.zeros_like(start) if x.grad is None else x.grad)


def test_top1():
    z = torch.nn.functional.normalize(torch.randn(6, 2, 9, generator=torch.Generator().manual_seed(0)), dim=2)
    assert pretrain.top1(z, z) == 1
    swapped = z[[1, 0, 2, 3, 4, 5]]
    assert abs(pretrain.top1(z, swapped) - 4 / 6) < 1e-6
    assert pretrain.top1(z, z.flip(1)) < 1                # view 0 alone counts
