"""pretrain.py: its schedule, its flags, what it prints, and what it says to bad input."""

import argparse
import ast
import math
import os
import shutil
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torchvision
from conftest import ROOT, SMALL, error_of, log_of, make_video, run, run_here, with_damaged
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import finetune
import pretrain
import retrieval
from data import Row
from experiments import search
from loss import double_sum, soft_info_nce
from models import SvaCLR, video_encoder
from prepare import scan
from pretrain import learning_rate, parse


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
    if trains:                                  # help has both where the built-in set differs
        help_of = {action.dest: action.help for action in parsers[0]._actions}
        ours, papers = script.parse([]), script.parse(["--data", "x"])
        for name, value in script.DEMO.items():
            default = getattr(papers, name)
            assert getattr(ours, name) == value != default and f"({default}: " in help_of[name]
            assert f"; built-in set: {value or 'all processes share 32'}" in help_of[name]


@pytest.mark.parametrize("flags,sentence", [
    (["--bogus"], "unrecognized arguments: --bogus"),
    (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
    (["--affinity", "both"], "invalid choice: 'both'"),
    (["--max-speed", "0"], "--max-speed: '0' is not a whole number of 1 or more"),
    (["--frames", "1.5"], "--frames: '1.5' is not a whole number of 1 or more"),
    (["--eta", "0"], "--eta: '0' is not a number above 0"),
    (["--max-failures", "1"], "--max-failures: '1' is not a share of 0 or more and less than 1"),
    (["--chunk", "1"], "--chunk: '1' is not a whole number of 2 or more"),
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
    (1, [], 32), (2, [], 16), (8, [], 4), (2, ["--batch-per-process", "32"], 32),
    (2, ["--chunk", "16"], 16),
    (3, [], "global batch of 32 clips does not divide among 3 processes"),
    (64, [], "does not divide among 64 processes: start 1, 2, 4, 8, 16 or 32 of them, or give"),
    (2, ["--chunk", "5"], "--chunk 5 does not divide the 16 clips of a process: give a divisor"),
    (1, ["--data", "x", "--chunk", "16"], "--chunk 16 does not divide the 8 clips of a process"),
    (8, ["--data", "x"], 8)])
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
    (["--data", "tree", *SMALL], "make_loader", "same_speed is False"),
    (["--data", "tree", *SMALL, "--same-speed"], "make_loader", "same_speed is True")])
def test_what_runs_is_what_was_asked_for(flags, name, sentence, tree, tmp_path, monkeypatch):
    """The run stops at the first call of a function, which says what it was called with."""
    def stop(clips, *_):
        raise ValueError(f"same_speed is {bool(getattr(clips, 'same_speed', None))}")

    monkeypatch.setattr(pretrain, name, stop)
    flags = [tree if word == "tree" else word for word in flags]
    done = run(*flags, "--out", tmp_path, check=False)
    assert done.returncode == 1 and sentence in done.stdout + done.stderr


def test_start_prints_the_effective_numbers(trained):
    for part in ("1 process(es) on cpu, float32 (as asked)",
                 "10 clips (0 left out), global batch 4 = 1 process(es) x 4 clips, 2 view(s)",
                 "6 negatives per query",
                 "2 steps an epoch, 20 steps in all",
                 "learning rate 0.0005 -> 0.005 -> 0.0007813", "times 4/512"):
        assert part in trained[1], part


def test_log_and_files(trained):
    out, _ = trained
    head, *events = log_of(out)
    assert head["args"]["max_speed"] == 4 and head["processes"] == 1
    assert [event["step"] for event in events] == [10, 20]
    assert math.isfinite(events[0]["loss"]) and events[0]["replaced"] == 0
    assert 0 <= events[0]["wait"] <= 1
    assert not list(out.glob("*.part"))
    theirs = torchvision.models.resnet18(weights=None)
    audio = torch.load(out / "audio_encoder.pt", weights_only=True)
    assert theirs.layer4[0].conv1.weight.shape == audio["layer4.0.conv1.weight"].shape
    weights = torch.load(out / "video_encoder.pt", weights_only=True)
    video_encoder("r2plus1d_10").load_state_dict(weights)


def test_same_command_again_has_nothing_to_do(trained, tree, capsys):
    out, _ = trained
    before = (out / "log.jsonl").read_text(), (out / "checkpoint.pt").stat().st_mtime_ns
    assert run_here(pretrain, "--data", tree, "--out", out, *SMALL, "--epochs", 10) == 0
    assert "has been trained to its last step" in capsys.readouterr().out
    assert before == ((out / "log.jsonl").read_text(), (out / "checkpoint.pt").stat().st_mtime_ns)


def test_other_settings_or_data_are_refused(trained, tree, tmp_path, capsys):
    out, _ = trained
    before = (out / "checkpoint.pt").read_bytes()
    listed = (out / "manifest.csv").read_bytes()
    (tmp_path / "others/train/a").mkdir(parents=True)
    make_video(tmp_path / "others/train/a/b.mp4", 2)
    assert run_here(pretrain, "--data", tmp_path / "others", "--out", out, *SMALL) == 1
    assert "made with other settings (data was" in error_of(capsys.readouterr().err)
    assert (out / "manifest.csv").read_bytes() == listed
    assert run_here(pretrain, "--data", tree, "--out", out, *SMALL, "--eta", "0.1") == 1
    assert ("made with other settings (epochs was 10 and is 4; eta was 0.07 and is 0.1): give the "
            "former ones or another --out" in error_of(capsys.readouterr().err))
    assert (out / "checkpoint.pt").read_bytes() == before
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    state["fingerprint"] = "9 clips, sum 1"                 # a file has been added since
    torch.save(state, tmp_path / "checkpoint.pt")
    assert run_here(pretrain, "--data", tree, "--out", tmp_path, *SMALL, "--epochs", 10) == 1
    assert "(data set was 9 clips, sum 1 and is 10 clips, sum " in capsys.readouterr().err


@pytest.mark.parametrize("data,flags,sentence", [
    ("gone", [], "no folder"), ("gone.csv", [], "no such manifest"), ("empty", [], "no video in"),
    ("few", [], "1 usable clips (1 left out) do not fill one global batch of 4: give a smaller "
     "--batch-per-process or more data"),
    ("few", ["--split", "val"], "has no 'val' part, it has 'train'"),
    ("few", ["--batch-per-process", "1"],
     "Eq. 1 contrasts a clip with other clips, but the global batch has 1: give it 2 or more")])
def test_bad_data(data, flags, sentence, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    if data == "few":
        make_video(tmp_path / "few" / "train" / "c" / "a.mp4", 2)
        make_video(tmp_path / "few" / "train" / "c" / "silent.mp4", 2, tone=None)
    assert run_here(pretrain, "--data", tmp_path / data, "--out", tmp_path / "out", *SMALL,
                    *flags) == 1
    assert sentence in error_of(capsys.readouterr().err)


@pytest.mark.slow
def test_bad_data_of_two_processes(tmp_path):
    done = run("--data", tmp_path / "gone", "--out", tmp_path, *SMALL, processes=2, check=False)
    assert done.returncode != 0 and done.stderr.count("error: --data") == 1


@pytest.mark.parametrize("part", ["f and g", "f"])
def test_first_weights_come_from_a_checkpoint(part, brief, tmp_path, capsys):
    state = torch.load(brief, weights_only=True)["model"]
    path = brief
    if part == "f":
        path = tmp_path / "video_encoder.pt"
        torch.save({name[2:]: x for name, x in state.items() if name.startswith("f.")}, path)
    flags = ["--init", str(path), "--out", str(tmp_path)]
    model, *_ = pretrain.build(parse(flags), torch.device("cpu"), torch.float32)
    assert f"first weights of {part} from {path}\n" in capsys.readouterr().out
    found = model.state_dict()
    for modules, same in (("f.", True), ("g.", part == "f and g"), ("h_v.0.", False)):
        assert same == all(x.equal(found[name]) for name, x in state.items()
                           if name.startswith(modules) and x.is_floating_point())


def test_first_weights_of_another_architecture_are_refused(brief, tmp_path):
    flags = ["--init", str(brief), "--arch", "r2plus1d_18", "--out", str(tmp_path)]
    with pytest.raises(ValueError, match="does not fit --arch r2plus1d_18: it .*; it was trained "
                                         "with --arch r2plus1d_10"):
        pretrain.build(parse(flags), torch.device("cpu"), torch.float32)
    (tmp_path / "checkpoint.pt").touch()        # a run that continues does not need the file
    pretrain.build(parse(flags), torch.device("cpu"), torch.float32)


@pytest.mark.slow
def test_files_that_fail_later(tree, tmp_path):
    """Files are damaged after the scan: they are replaced and counted; too many stop the run."""
    rows = scan.scan(tree / "train")
    two, _ = with_damaged(list(rows), tmp_path, [0, 1])
    settings = [*SMALL, "--data"]
    done = run(*settings, two, "--out", tmp_path / "some", "--max-failures", "0.5")
    assert log_of(tmp_path / "some")[-1]["replaced"] > 0
    assert "replaced: " in done.stderr and "bad0.mp4: Invalid data" in done.stderr
    done = run(*settings, two, "--out", tmp_path / "many", "--max-failures", "0.01", check=False)
    assert done.returncode == 1 and (tmp_path / "many" / "checkpoint.pt").exists()
    assert ("drawn since the start could not be read, clearly more than --max-failures 0.01 of"
            in error_of(done.stderr))
    every, _ = with_damaged(rows, tmp_path, range(len(rows)))
    done = run(*settings, every, "--out", tmp_path / "all", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert error_of(done.stderr).startswith("error: 10 files in a row failed, the last: ")


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
    (["--affinity", "view"], {"affinity": "view"}),
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
    assert pretrain.top1(z, z.flip(1)) < 1                  # view 0 alone counts


class Vectors(torch.nn.Module):
    """A model of the form of SvaCLR for clips that are vectors. It computes in float64 too."""

    def __init__(self):
        super().__init__()
        layers = lambda a, b: torch.nn.Sequential(torch.nn.Linear(a, b), torch.nn.BatchNorm1d(b))
        self.f, self.g, self.h, self.l = layers(7, 6), layers(5, 6), layers(6, 4), layers(6, 6)

    def forward(self, audio, video):
        y_a, y_v = self.g(audio.flatten(0, 1)).relu(), self.f(video.flatten(0, 1)).relu()
        outputs = self.l(y_a), self.l(y_v), self.h(y_a), self.h(y_v)
        return [x.unflatten(0, audio.shape[:2]) for x in outputs]


# The limits of the relative error. Float32 rounds differently in products of another shape.
MODELS = {"float64": lambda: Vectors().double(), "float32": Vectors,
          "SvaCLR": lambda: SvaCLR("r2plus1d_10", "mlp")}
LIMITS = {"float64": 1e-10, "float32": 1e-6, "SvaCLR": 1e-5}
AFFINITIES = ("none", "clip", "view", "batch")
CASES = [*product(("float64", "float32"), AFFINITIES), ("SvaCLR", "clip")]
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def sixteen_clips(kind, affinity="clip"):
    """The model, and the same (audio, video) on all processes."""
    torch.manual_seed(0)
    shapes = ((1, 40, 11), (3, 2, 16, 16)) if kind == "SvaCLR" else ((5,), (7,))
    model = MODELS[kind]()
    if affinity == "none":
        model.l = torch.nn.Identity()           # as parse demands: all weights have a gradient
    dtype = next(model.parameters()).dtype
    return model, [torch.randn(16, 2, *shape, dtype=dtype) for shape in shapes]


def gradient(kind, affinity, n):
    """The gradient of 16 clips that the processes share out, in n chunks each, or whole (n = 1).

    Returns also how often the processes summed up gradients.
    """
    model, batch = sixteen_clips(kind, affinity)
    W, sums = dist.get_world_size(), []
    net = torch.nn.parallel.DistributedDataParallel(model) if W > 1 else model
    if W > 1:
        net.register_comm_hook(None, lambda group, bucket: (sums.append(1),
                                                            allreduce_hook(group, bucket))[1])
    batch = [x[dist.get_rank()::W] for x in batch]
    objective = objective_of(affinity)
    if n == 1:
        objective(*net(*batch)).backward()
    else:
        pretrain.step_in_chunks(net, objective, net, NO_SCALER, batch, n)
    return torch.cat([x.grad.flatten() for x in model.parameters()]), len(sums)


def gradients(out):
    """What each of four processes does: {(processes, chunks, kind, affinity): gradient}."""
    torch.set_num_threads(1)
    rank, found = int(os.environ["RANK"]), {}
    for W in (4, 2, 1):
        if rank < W:
            dist.init_process_group("gloo", init_method=f"file://{out}/{W}", rank=rank,
                                    world_size=W)
            for n, (kind, affinity) in product({1: (2, 4), 2: (1, 2), 4: (1,)}[W], CASES):
                found[W, n, kind, affinity] = gradient(kind, affinity, n)
            dist.barrier()
            dist.destroy_process_group()
    if rank == 0:
        torch.save(found, f"{out}/found.pt")


@pytest.mark.slow
def test_chunks_have_the_gradient_of_as_many_processes(tmp_path):
    """Chunks of one process, of two, and no chunks: BatchNorm sees the same clips together."""
    code = f"import test_pretrain; test_pretrain.gradients({str(tmp_path)!r})"
    (tmp_path / "worker.py").write_text(code)
    run(script=tmp_path / "worker.py", processes=4)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for kind, affinity in CASES:
        for chunked, whole in (((1, 2), (2, 1)), ((1, 4), (4, 1)), ((2, 2), (4, 1))):
            (a, sums), (b, sums_whole) = (found[*x, kind, affinity] for x in (chunked, whole))
            error = ((a - b).norm() / b.norm()).item()
            print(f"{kind}, {affinity}, {chunked} against {whole}: {error:.1e}")
            assert error <= LIMITS[kind], (kind, affinity, chunked)
            assert chunked[0] == 1 or sums == sums_whole        # with the last chunk alone


@pytest.mark.parametrize("affinity", AFFINITIES)
def test_chunks_have_the_gradient_of_the_batch(affinity):
    """Where BatchNorm does not tie the clips of a batch together. A scaler scales gradients."""
    model, batch = sixteen_clips("float64", affinity)
    model.eval()
    objective = objective_of(affinity)
    outputs = model(*batch)
    loss = objective(*outputs)
    loss.backward()
    whole = [x.grad for x in model.parameters()]
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    again, z_a, z_v = pretrain.step_in_chunks(model, objective, model, scaler, batch, 4)
    torch.testing.assert_close(again, loss)
    order = [i for k in range(4) for i in range(k, 16, 4)]
    torch.testing.assert_close(z_a, outputs[2][order])
    torch.testing.assert_close(z_v, outputs[3][order])
    for x, expected in zip(model.parameters(), whole):
        torch.testing.assert_close(x.grad / 1024, expected, atol=1e-12, rtol=1e-10)


def test_statistics_move_once_a_chunk():
    model, batch = sixteen_clips("float64")
    norm = torch.nn.BatchNorm1d(6).double()
    for k in range(4):
        norm(model.f[0](batch[1][k::4].flatten(0, 1)))
    pretrain.step_in_chunks(model, soft_info_nce, model, NO_SCALER, batch, 4)
    torch.testing.assert_close(model.f[1].running_mean, norm.running_mean)
    torch.testing.assert_close(model.f[1].running_var, norm.running_var)
    assert model.f[1].num_batches_tracked == 4


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """one_step(B, flags): what the command for one step of ten clips prints, loss, gradient, model.

    B: clips of a process.
    """
    data = tmp_path_factory.mktemp("ten")
    for n in range(10):
        make_video(data / f"a/{n}.mp4", 2.0, 10, tone=300 + 50 * n)

    def command(B, *flags, **how):
        out = tmp_path_factory.mktemp("step")
        done = run("--data", data, *SMALL, "--epochs", 1, "--batch-per-process", B, "--out", out,
                   *flags, **how)
        state = torch.load(out / "checkpoint.pt", weights_only=True)
        momentum = [x["momentum_buffer"].flatten() for x in state["optimizer"]["state"].values()]
        line = log_of(out)[-1]
        assert line["step"] == 1                # so momentum is the gradient
        return done.stdout, line["loss"], torch.cat(momentum), state["model"]
    return command


@pytest.fixture(scope="module")
def step_of_ten(one_step):
    """What `one_step` returns for one process."""
    return one_step(10)


def test_two_processes_are_one(one_step, step_of_ten):
    _, loss, gradient, model = step_of_ten
    printed, loss_of_two, gradient_of_two, model_of_two = one_step(5, processes=2)
    assert "2 process(es) on cpu" in printed
    assert "global batch 10 = 2 process(es) x 5 clips, 2 view(s): 18 negatives per" in printed
    assert abs(loss - loss_of_two) < 1e-4
    for name, x in model.items():
        if "running" in name:
            torch.testing.assert_close(model_of_two[name], x, atol=1e-4, rtol=1e-3, msg=name)
    # Convolutions round differently on one thread and on two.
    assert (gradient_of_two - gradient).norm() / gradient.norm() < 0.01


def test_a_step_in_chunks(one_step):
    printed, *_ = one_step(10, "--chunk", 5)
    assert ("global batch 10 = 1 process(es) x 10 clips in chunks of 5, 2 view(s): 18 negatives "
            "per query" in printed)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_a_compiled_step(one_step, step_of_ten):
    """--compile of two processes trains, and the weights after a step are those of one process
    without it but for rounding."""
    plain, compiled = step_of_ten[-1], one_step(5, "--compile", processes=2)[-1]
    assert plain.keys() == compiled.keys()
    for name, x in plain.items():
        torch.testing.assert_close(compiled[name], x, atol=1e-3, rtol=1e-3, msg=name)
