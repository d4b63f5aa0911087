"""pretrain.py: its schedule, its flags, what it prints, and what it says to bad input."""

import argparse
import ast
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL, error_of, log_of, make_video, run, run_here, run_two, with_damaged
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import finetune
import pretrain
import retrieval
from experiments import search
from loss import double_sum, soft_info_nce
from models import SvaCLR
from prepare import scan
from prepare.scan import Row
from pretrain import learning_rate, parse
from support.processes import rank, start, world_size


def test_learning_rate():
    """§3.1: 0.064 -> 0.64 in 10 epochs, cosine to 0.10 at epoch 100, per step."""
    lr = lambda step: learning_rate(step / 451, warmup=10, epochs=100, peak=0.64)
    assert lr(0) == pytest.approx(0.064)
    assert lr(2255) == pytest.approx((0.064 + 0.64) / 2)
    assert lr(4510) == pytest.approx(0.64)
    assert lr(4510 + 45 * 451) == pytest.approx((0.64 + 0.10) / 2)
    assert lr(45100) == pytest.approx(0.10)
    rates = [lr(step) for step in range(0, 45101, 50)]
    assert rates == sorted(rates[:91]) + sorted(rates[91:], reverse=True)
    assert learning_rate(0, 0, 3, 1.0) == 1.0
    assert learning_rate(3, 2.5, 3, 1.0) == learning_rate(3, 0, 3, 1.0) == pytest.approx(0.1 / 0.64)


def test_defaults_are_the_papers():
    args = parse(["--data", "x"])
    paper = dict(max_speed=4, epochs=100, warmup=10, batch_per_process=8, lr=0.64,
                 arch="r2plus1d_18", mapping="identity", affinity="clip", size=128, eta=0.07,
                 frames=30, fps=30, weight_decay=1e-5)
    assert {name: getattr(args, name) for name in paper} == paper
    demo = parse([])
    assert {name: getattr(demo, name) for name in pretrain.DEMO} == pretrain.DEMO
    assert demo.warmup == 1.5 and parse(["--epochs", "30"]).warmup == 3
    assert parse(["--epochs", "3"]).epochs == 3     # a flag outranks the built-in set's settings
    assert parse(["--data", "x", "--epochs", "5"]).warmup == 0.5
    assert parse(["--data", "x", "--epochs", "5", "--warmup", "2"]).warmup == 2


@pytest.mark.parametrize("script", [pretrain, finetune, retrieval, search])
def test_every_flag_is_read_and_says_its_defaults_and_their_source(script, monkeypatch):
    trains = script in (pretrain, finetune)
    files = Path(script.__file__), ROOT / ("support/run.py" if trains else "retrieval.py")
    source = "".join(path.read_text() for path in files)
    read = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)
            and ast.unparse(node.value) in ("args", "self.args")}
    parsers, original = [], argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args",
                        lambda self, *a: parsers.append(self) or original(self, *a))
    flags = ["--query", "x"] if script is search else ["--data", "x"]
    assert vars(script.parse(flags)).keys() - read == set()
    for action in parsers[0]._actions:
        assert "(" in action.help or action.dest == "help", action.dest
    for name, value in (script.DEMO if trains else {}).items():     # help has both
        text, = (action.help for action in parsers[0]._actions if action.dest == name)
        assert f"; built-in set: {value or 'all processes share 32'}" in text


@pytest.mark.parametrize("flags,sentence", [
    (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
    (["--frames", "1.5"], "--frames: '1.5' is not a whole number of 1 or more"),
    (["--chunk", "1"], "--chunk: '1' is not a whole number of 2 or more"),
    (["--eta", "0"], "--eta: '0' is not a number above 0"),
    (["--max-failures", "1"], "--max-failures: '1' is not a share of 0 or more and less than 1"),
    (["--same-speed", "--max-speed", "1"], "--same-speed has no speed to draw"),
    (["--warmup", "9", "--epochs", "3"], "--warmup 9.0 is longer than --epochs 3"),
    (["--mapping", "mlp", "--affinity", "none"], "--mapping mlp has nothing to learn from"),
    (["--mapping", "linear", "--max-speed", "1"], "--mapping linear has nothing to learn from"),
    (["--mapping", "linear", "--detach-affinity"], "--mapping linear has nothing to learn from")])
def test_bad_flags(flags, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(flags)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize("W,flags,expected", [
    (8, [], 4), (2, ["--batch-per-process", "32"], 32), (8, ["--data", "x"], 8),
    (64, [], "does not divide among 64 processes: start 1, 2, 4, 8, 16 or 32 of them, or give"),
    (2, ["--chunk", "5"], "--chunk 5 does not divide the 16 clips of a process: give a divisor")])
def test_the_built_in_set_has_one_global_batch(W, flags, expected, monkeypatch):
    monkeypatch.setattr(pretrain, "world_size", lambda: W)
    args = parse(flags)
    if isinstance(expected, int):
        assert pretrain.clips_per_process(args) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            pretrain.clips_per_process(args)


@pytest.mark.parametrize("flags,name,sentence", [
    (["--epochs", 30, "--fps", 6], "find_rows",
     "No --data: training on the built-in set, with arch r2plus1d_10, size 32, frames 4, fps 6, "
     "epochs 30, warmup 3.0\n"),
    (["--data", "tree", *SMALL, "--same-speed"], "make_loader", "same_speed is True"),
    (["--data", "tree", *SMALL, "--chunk", 2], "step_in_chunks",
     "global batch 4 = 1 process(es) x 4 clips in chunks of 2, 2 view(s): 6 negatives per query")])
def test_what_runs_is_what_was_asked_for(flags, name, sentence, tree, tmp_path, monkeypatch):
    """The run stops at the first call of a function, which says what it was called with."""
    def stop(clips, *_):
        raise ValueError(f"same_speed is {getattr(clips, 'same_speed', None)}")

    monkeypatch.setattr(pretrain, name, stop)
    flags = [tree if word == "tree" else word for word in flags]
    done = run(*flags, "--out", tmp_path, check=False)
    assert done.returncode == 1 and sentence in done.stdout + done.stderr


def test_what_a_run_prints_and_writes(trained):
    out, text = trained
    for part in ("1 process(es) on cpu, float32 (as asked)",
                 "10 clips (0 left out), global batch 4 = 1 process(es) x 4 clips, 2 view(s): "
                 "6 negatives per query, 2 steps an epoch, 20 steps in all",
                 "learning rate 0.0005 -> 0.005 -> 0.0007813", "times 4/512"):
        assert part in text, part
    head, *events = log_of(out)
    assert head["args"]["max_speed"] == 4 and head["processes"] == 1
    assert [event["step"] for event in events] == [10, 20]
    assert math.isfinite(events[0]["loss"]) and events[0]["replaced"] == 0
    assert 0 <= events[0]["wait"] <= 1


@pytest.mark.slow
def test_a_run_that_has_ended(trained, tree, tmp_path, capsys):
    """The same command has nothing to do. Other settings, or a folder with other data, are refused,
    and change nothing."""
    out, flags = trained[0], [*SMALL, "--epochs", 10, "--data"]
    files = "log.jsonl", "checkpoint.pt", "manifest.csv"
    before = [(out / name).read_bytes() for name in files]
    assert run_here(pretrain, *flags, tree, "--out", out) == 0
    assert "has been trained to its last step" in capsys.readouterr().out
    make_video(tmp_path / "others/train/a/b.mp4", 2)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    state["fingerprint"] = "9 clips, sum 1"                 # a file has been added since
    torch.save(state, tmp_path / "checkpoint.pt")
    for words, sentence in (
            ([tmp_path / "others", "--out", out], "made with other settings (data was"),
            ([tree, "--out", out, "--eta", "0.1", "--epochs", 4],
             "made with other settings (epochs was 10 and is 4; eta was 0.07 and is 0.1): give the "
             "former ones or another --out"),
            ([tree, "--out", tmp_path], "(data set was 9 clips, sum 1 and is 10 clips, sum ")):
        assert run_here(pretrain, *flags, *words) == 1
        assert sentence in error_of(capsys.readouterr().err)
    assert [(out / name).read_bytes() for name in files] == before


@pytest.mark.parametrize("data,flags,sentence", [
    ("gone", [], "gone is no folder"), ("gone.csv", [], "gone.csv: no such manifest"),
    ("empty", [], "no video in"),
    ("few", [], "1 usable clips (1 left out) do not fill one global batch of 4: give a smaller "
     "--batch-per-process or more data"),
    ("few", ["--split", "val"], "has no 'val' part, it has 'train'"),
    ("gone", ["--init", "gone.pt"], "no checkpoint gone.pt"),       # said before a scan
    ("with.csv", [], "10 files in a row failed, the last: ")])
def test_bad_data(data, flags, sentence, tree, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    if data == "few":
        make_video(tmp_path / "few" / "train" / "c" / "a.mp4", 2)
        make_video(tmp_path / "few" / "train" / "c" / "silent.mp4", 2, tone=None)
    elif data == "with.csv":                                # all files are damaged since the scan
        with_damaged(scan.scan(tree / "train"), tmp_path, range(10))
    assert run_here(pretrain, "--data", tmp_path / data, "--out", tmp_path / "out", *SMALL,
                    *flags) == 1
    errors = capsys.readouterr().err
    assert sentence in error_of(errors) and "Traceback" not in errors


@pytest.mark.slow
def test_first_weights_come_from_a_file(brief, tmp_path, capsys):
    """Of f and g, or of f alone. A run that continues does not need the file."""
    state = torch.load(brief, weights_only=True)["model"]
    encoder = brief.with_name("video_encoder.pt")
    for part, path in (("f and g", brief), ("f", encoder)):
        args = parse(["--init", str(path), "--out", str(tmp_path)])
        model, *_ = pretrain.build(args, torch.device("cpu"), torch.float32)
        assert f"first weights of {part} from {path}\n" in capsys.readouterr().out
        found = model.state_dict()
        for modules, same in (("f.", True), ("g.", part == "f and g"), ("h_v.0.", False)):
            assert same == all(x.equal(found[name]) for name, x in state.items()
                               if name.startswith(modules) and x.is_floating_point())
    (tmp_path / "checkpoint.pt").touch()
    args.init = "gone.pt"
    pretrain.build(args, torch.device("cpu"), torch.float32)


class OneStep:
    """Stands in for a Run: it gives one batch of four clips and keeps what the loop logs."""

    def __init__(self, args, loader, model, *_):
        OneStep.model, OneStep.start = model, [x.detach().clone() for x in model.parameters()]

    def __iter__(self):
        yield 0.0, [torch.zeros(4, 2, 1, 16, 16, 3, dtype=torch.uint8), torch.zeros(4, 2, 2400)]

    def log(self, **measures):
        OneStep.measures = measures

    def write(self, state, name):
        pass


def objective_of(affinity):
    """The function of loss.py that --affinity chooses."""
    return double_sum if affinity == "batch" else partial(soft_info_nce, affinity=affinity)


class Numbers(torch.nn.Module):
    """A network that ignores its input: its outputs ly_a, ly_v, z_a, z_v are its parameters."""

    def __init__(self, *_):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.x = torch.nn.ParameterList(torch.rand(4, 2, 8, generator=g) for _ in range(4))
        self.f, self.g = torch.nn.Identity(), torch.nn.Identity()

    def forward(self, audio, video):
        assert video.shape == (4, 2, 3, 1, 16, 16) and audio.shape == (4, 2, 1, 40, 11)
        return tuple(self.x)


@pytest.mark.parametrize("flags,keywords", [
    ([], {}), (["--eta", "0.2"], {"eta": 0.2}), (["--affinity", "none"], {"affinity": "none"}),
    (["--affinity", "batch"], {"affinity": "batch"}),
    (["--affinity-temperature", "0.1"], {"affinity_temperature": 0.1}),
    (["--raw-affinity"], {"raw_affinity": True}),
    (["--detach-affinity"], {"detach_affinity": True}), (["--one-way"], {"one_way": True})])
def test_flags_of_the_objective_reach_it(flags, keywords, tmp_path, monkeypatch):
    """The loop's loss and step are those of the function with that keyword alone."""
    row = Row("a.mp4", "a", "", 9.0, 9.0, True, "")
    for name, value in (("SvaCLR", Numbers), ("Run", OneStep),
                        ("find_rows", lambda *_: ([row] * 4, {}))):
        monkeypatch.setattr(pretrain, name, value)
    assert run_here(pretrain, "--data", "x", "--batch-per-process", "4", "--weight-decay", "0",
                    "--precision", "fp32", "--lr", "100", "--out", tmp_path, *flags) == 0
    start = [x.clone().requires_grad_() for x in OneStep.start]
    expected = objective_of(keywords.pop("affinity", "clip"))(*start, **keywords)
    expected.backward()
    torch.testing.assert_close(OneStep.measures["loss"].detach(), expected.detach())
    for moved, x in zip(OneStep.model.x, start):
        gradient = torch.zeros_like(x) if x.grad is None else x.grad
        torch.testing.assert_close((x - moved).detach() / OneStep.measures["lr"], gradient,
                                   atol=1e-5, rtol=1e-4)


def test_top1():
    g = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(6, 2, 9, generator=g), dim=2)
    assert pretrain.top1(z, z) == 1
    swapped = z[[1, 0, 2, 3, 4, 5]]
    assert abs(pretrain.top1(z, swapped) - 4 / 6) < 1e-6
    assert pretrain.top1(z, torch.stack([z[:, 0], -z[:, 1]], 1)) == 1     # view 0 alone counts


# ---- chunks

def eight_clips():
    """A model and the same (audio, video) on all processes, in float64."""
    torch.manual_seed(0)
    model = SvaCLR("r2plus1d_10").double()
    return model, [torch.randn(8, 2, *shape, dtype=torch.float64)
                   for shape in ((1, 40, 11), (3, 2, 16, 16))]


def gradient_of(model):
    return torch.cat([x.grad.flatten() for x in model.parameters()])


def all_at_once(model, objective, batch):
    """What step_in_chunks does in four chunks, with all of them in memory: the loss, z_a, z_v."""
    outputs = [model(*(x[k::4] for x in batch)) for k in range(4)]
    ly_a, ly_v, z_a, z_v = (torch.cat(x) for x in zip(*outputs))
    loss = objective(ly_a, ly_v, z_a, z_v)
    loss.backward()
    return loss, z_a, z_v


@pytest.mark.slow
@pytest.mark.parametrize("affinity", ["clip", "batch"])
def test_chunks_have_the_gradient_of_the_batch(affinity):
    """BatchNorm's statistics move once a chunk. A scaler scales gradients."""
    results = []
    for step, scaled in ((all_at_once, 1), (pretrain.step_in_chunks, 1024)):
        model, batch = eight_clips()
        words = [model, objective_of(affinity), batch]
        if scaled > 1:
            words[2:] = [model, torch.amp.GradScaler("cpu", init_scale=1024.0), batch, 4]
        loss, z_a, z_v = step(*words)
        results.append([loss, z_a, z_v, gradient_of(model) / scaled, *model.buffers()])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)


def chunks_of_two_processes():
    """Two chunks of each of two processes are four chunks of one process. The processes sum up
    their gradients with the last chunk alone."""
    start()
    model, batch = eight_clips()
    net, sums = torch.nn.parallel.DistributedDataParallel(model), []
    net.register_comm_hook(None, lambda group, bucket: (sums.append(bucket.index()),
                                                        allreduce_hook(group, bucket))[1])
    batch_here = [x[rank()::world_size()] for x in batch]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    pretrain.step_in_chunks(net, soft_info_nce, net, scaler, batch_here, 2)
    assert sums == list(range(len(sums))), sums             # each bucket once
    found = gradient_of(model)
    dist.barrier()
    dist.destroy_process_group()
    model, batch = eight_clips()
    all_at_once(model, soft_info_nce, batch)
    torch.testing.assert_close(found, gradient_of(model), atol=1e-10, rtol=1e-8)
    print("equal")


@pytest.mark.slow
def test_chunks_of_two_processes(tmp_path):
    script = "import test_pretrain\ntest_pretrain.chunks_of_two_processes()"
    assert run_two(tmp_path, script) == ["equal", "equal"]


# ---- two processes

def one_step(data, out, B, *flags, processes=1):
    """One step of ten clips, B on each process: loss, gradient, weights.

    Rounding, which one core and two do not do alike, moves the gradient by 1.1 % with seed 0, and
    by 0.6 % at most with seed 1. (test_chunks_of_two_processes compares it in float64.)
    """
    run("--data", data, *SMALL, "--seed", 1, "--epochs", 1, "--batch-per-process", B, "--out", out,
        *flags, processes=processes)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    momentum = [x["momentum_buffer"].flatten() for x in state["optimizer"]["state"].values()]
    line = log_of(out)[-1]
    assert line["step"] == 1                    # so momentum is the gradient
    return line["loss"], torch.cat(momentum), state["model"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_two_processes_are_one(flags, tmp_path):
    """With --compile too, but for rounding. A sentence on bad data comes from one of them."""
    if flags and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on CPUs")
    for n in range(10):                         # BatchNorm would enlarge rounding on one gray
        make_video(tmp_path / f"ten/a/{n}.mp4", 2.0, 10, tone=300 + 50 * n)
    loss, gradient, model = one_step(tmp_path / "ten", tmp_path / "one", 10)
    loss_of_two, gradient_of_two, model_of_two = one_step(
        tmp_path / "ten", tmp_path / "two", 5, *flags, processes=2)
    assert abs(loss - loss_of_two) < 1e-4 and model.keys() == model_of_two.keys()
    for name, x in model.items():
        if flags or "running" in name:
            torch.testing.assert_close(model_of_two[name], x, atol=1e-3 if flags else 1e-4,
                                       rtol=1e-3, msg=name)
    if not flags:
        # Convolutions round differently on one thread and on two.
        assert (gradient_of_two - gradient).norm() / gradient.norm() < 0.01
        done = run("--data", tmp_path / "gone", "--out", tmp_path / "gone", *SMALL, processes=2,
                   check=False)
        assert done.returncode != 0 and done.stderr.count("error: --data") == 1
