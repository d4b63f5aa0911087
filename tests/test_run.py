"""support/run.py: real processes that are killed, pre-empted, out of disk space, or diverge."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, log_of, run, run_here

import finetune
import pretrain
import retrieval
from data import Row, make_loader
from prepare import scan
from support import processes
from support.processes import INTERRUPTED
from support.run import Run, clearly_more, fingerprint, lock_folder, truncate_log, write_atomic

METHODS = ["fork", "forkserver", "spawn"]       # forkserver is the default from Python 3.14 on

# A short run that saves at each line of the log, in float32, so that it repeats to the bit.
SHORT = ["--arch", "r2plus1d_10", "--size", "16", "--frames", "4", "--fps", "4", "--warmup", "1",
         "--workers", "1", "--precision", "fp32", "--save-every", "0"]


def start(out, *flags, torchrun=(), method="fork", core=None):
    """Start pretrain.py with the settings of SHORT, under torchrun if its flags are given.

    method: how its loading processes are started. core: the only one that the run may use.
    """
    launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    output = open(out.with_suffix(".txt"), "a")
    site = out.with_name(f"{out.name}_site_{method}")
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text("import multiprocessing\n"
                                           f"multiprocessing.set_start_method({method!r})\n")
    process = subprocess.Popen([sys.executable, *launcher, "pretrain.py", "--out", str(out), *SHORT,
                                *map(str, flags)], cwd=ROOT, stdout=output, stderr=output,
                               start_new_session=True,
                               env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                                                 "PYTHONPATH": str(site)})
    if core is not None:
        os.sched_setaffinity(process.pid, {core})
    return process


def text_of(out):
    """What the runs with --out OUT have printed."""
    return out.with_suffix(".txt").read_text()


def steps(out):
    """The step numbers in OUT/log.jsonl."""
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line)["step"] for line in lines[1:] if line.endswith("}")]


def wait_for(condition, process, out):
    """Wait until condition() holds, while the process lives."""
    while not condition():
        assert process.poll() is None, text_of(out)
        time.sleep(0.05)


def state_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same(one, other):
    """Whether two nested states are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one.equal(other) if isinstance(one, torch.Tensor) else one == other


def events(out):
    """The lines of OUT/log.jsonl after the first, without the values that depend on the clock."""
    return [{name: value for name, value in line.items() if name not in ("clips_per_s", "wait")}
            for line in log_of(out)[1:]]


def assert_same_result(one, other):
    """Weights, momentum, position and log of two runs are equal, to the bit."""
    first, second = state_of(one), state_of(other)
    for name in ("model", "optimizer", "scaler", "position", "step", "replaced", "skipped"):
        assert same(first[name], second[name]), name
    assert events(one) == events(other)


def helpers_of(process):
    """The numbers of the other processes of its group: loading processes, and their server."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):                 # it has ended
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            if int(group) == process.pid and state != "Z":
                found.append(int(path.parent.name))
    return [number for number in found if number != process.pid]


@pytest.mark.slow
def test_killed_runs_end_with_the_same_weights(tree, tmp_path):
    """Kill -9 comes after checkpoints and within steps, once for each way to start the loading
    processes; then the run goes to its end. The lock that each leaves is no hindrance. The run
    that nobody kills has another core at the same time."""
    flags = ["--data", tree, "--epochs", 17, "--batch-per-process", 4]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    cores = sorted(os.sched_getaffinity(0))
    undisturbed = start(whole, *flags, core=cores[-1])
    for least, method in zip((10, 20, 30), METHODS):
        process = start(cut, *flags, method=method, core=cores[0])
        wait_for(lambda: max(steps(cut), default=0) >= least and (cut / "checkpoint.pt").exists(),
                 process, cut)
        time.sleep(0.2 * (least == 30))
        assert helpers_of(process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        killed = time.monotonic()
        while helpers_of(process):
            assert time.monotonic() - killed < 30, "a killed run leaves processes behind"
            time.sleep(0.1)
    assert start(cut, *flags, core=cores[0]).wait() == 0, text_of(cut)
    assert undisturbed.wait() == 0, text_of(whole)
    assert text_of(cut).count(f"continuing {cut / 'checkpoint.pt'} at step ") == 3
    assert_same_result(whole, cut)


@pytest.mark.slow
def test_a_signal_to_the_group_saves_and_leaves_the_mark(tree, tmp_path, capsys):
    """The loading processes and the server that forks them get the signal first, and do not mind.
    While the run lives, no other run has its --out. The next start removes the mark."""
    data, cores = ["--data", tree, "--batch-per-process", 2], sorted(os.sched_getaffinity(0))
    runs = [(number, tmp_path / method, start(tmp_path / method, *data, "--epochs", 400,
                                              "--save-every", 60, method=method, core=core))
            for number, method, core in ((signal.SIGTERM, "forkserver", cores[0]),
                                         (signal.SIGUSR1, "spawn", cores[-1]))]
    for number, out, process in runs:
        wait_for(lambda: steps(out), process, out)
        assert run_here(pretrain, *data, "--out", out, *SHORT) == 1
        owner = f"process {process.pid} on {socket.gethostname()}"
        assert f"in use by {owner}: wait until it has ended" in capsys.readouterr().err
        helpers = helpers_of(process)
        assert len(helpers) >= 2
        for helper in helpers:
            os.kill(helper, number)
        last = max(steps(out))
        wait_for(lambda: max(steps(out)) > last, process, out)
        os.killpg(process.pid, number)
        assert process.wait(60) == 75
        assert "Traceback" not in text_of(out) and (out / "requeue").exists()
        step = state_of(out)["step"]
        assert f"stopped by a signal, saved at step {step} of " in text_of(out)
        assert run_here(pretrain, *data, "--out", out, *SHORT) == 1     # other --epochs
        assert "epochs was 400 and is 100" in capsys.readouterr().err
        assert not (out / "requeue").exists()


class Numbers(torch.utils.data.Dataset):
    """Ten clips that are numbers."""

    clips_per_file, seed = None, 0
    rows = [Row(f"{n}.mp4", "a", "train", 1.0, 1.0, True, "") for n in range(10)]

    def __len__(self):
        return 10

    def __getitem__(self, key):
        return torch.tensor([1.0 + key[1]]), torch.tensor(0.0), (f"{key[1]}.mp4", [])


def numbers_run(out, model, scaling=False):
    """A Run of 20 steps over Numbers, with a gradient scaler if `scaling`, and its optimiser."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    args = Namespace(epochs=4, save_every=0.0, keep_every=None, max_failures=0.05, seed=0,
                     out=str(out))
    lock_folder(out)
    loader = make_loader(Numbers(), 2, workers=0, epochs=4)
    scaler = torch.amp.GradScaler("cpu", enabled=scaling)
    return Run(args, loader, model, optimizer, scaler, {}), optimizer


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The loss is finite, its gradient at zero is not: the run stops and saves nothing of it."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    trainer, optimizer = numbers_run(tmp_path, model)
    message = "weights that are not finite after step 10, learning rate 0.01: there is no check"
    with pytest.raises(FloatingPointError, match=message):
        for n, (_, (x, _)) in enumerate(trainer):
            loss = model(x).abs().sqrt().mean() if n == 0 else torch.tensor(1.0)
            if n == 0:
                loss.backward()
                optimizer.step()
            trainer.log(loss=loss, lr=0.01)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_batch_whose_loss_is_not_finite_is_named(tmp_path):
    """Step 7 has the bad loss. The message and the log name its two files, not those of step 10."""
    trainer, _ = numbers_run(tmp_path, torch.nn.Linear(1, 1))
    batches = []
    with pytest.raises(FloatingPointError) as stop:
        for n, (_, (x, _)) in enumerate(trainer, 1):
            batches.append([f"{int(value) - 1}.mp4" for value in x.flatten()])
            trainer.log(loss=torch.tensor(float("nan") if n == 7 else 1.0), lr=0.01 * n)
    sentence = f"loss nan at step 7, learning rate 0.07, batch {', '.join(batches[6])}: "
    assert sentence in str(stop.value)
    assert log_of(tmp_path)[-1]["files"] == batches[6]


def test_the_log_has_means(tmp_path):
    """Loss and other tensors are means over the ten steps of a line, numbers those of the last."""
    trainer, _ = numbers_run(tmp_path, torch.nn.Linear(1, 1))
    for n, _ in enumerate(trainer, 1):
        trainer.log(loss=torch.tensor(float(n)), top1=torch.tensor(0.1 * n), lr=0.01 * n)
    lines = log_of(tmp_path)[1:]
    assert [line["step"] for line in lines] == [10, 20]
    assert [line["loss"] for line in lines] == [5.5, 15.5]
    assert [line["top1"] for line in lines] == pytest.approx([0.55, 1.55])
    assert [line["lr"] for line in lines] == pytest.approx([0.1, 0.2])


def test_fingerprint_tells_data_sets_apart():
    def of(*names_and_labels):
        return fingerprint([Row(path, label, "train", 1.0, 1.0, True, "")
                            for path, label in names_and_labels])

    one = of(("/here/a.mp4", "bell"), ("/here/b.mp4", "drum"))
    assert one == of(("/moved/a.mp4", "bell"), ("/moved/b.mp4", "drum"))
    others = (of(("/here/a.mp4", "drum"), ("/here/b.mp4", "drum")),
              of(("/here/c.mp4", "bell"), ("/here/b.mp4", "drum")))
    assert len({one, *others}) == 3


def test_restarts_without_a_store_of_their_own_are_warned_of(monkeypatch, capsys):
    torch.distributed.destroy_process_group()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    for present in (False, True):
        if present:
            monkeypatch.setenv(processes.UNSHARED, "1")
        processes.start()
        torch.distributed.destroy_process_group()
        warned = "needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err
        assert warned != present


def test_a_run_continues_in_another_precision(tmp_path):
    """From bfloat16, without a gradient scaler, to float16 with one, and the other ways."""
    for name, before, after in (("a", False, True), ("b", True, False), ("c", True, True)):
        model = torch.nn.Linear(1, 1)
        trainer, _ = numbers_run(tmp_path / name, model, before)
        for n, _ in enumerate(trainer, 1):
            trainer.log(loss=torch.tensor(1.0), lr=0.1)
            if n == 11:
                break
        again, _ = numbers_run(tmp_path / name, torch.nn.Linear(1, 1), after)
        assert again.step == 10 and again.model.weight.equal(model.weight)


def test_same_sees_every_difference():
    x = {"a": [torch.ones(2), (1, 2)]}
    assert same(x, {"a": [torch.ones(2), (1, 2)]})
    for other in ({"a": [torch.ones(2), (1, 3)]}, {"a": [torch.ones(2) + 1e-7, (1, 2)]},
                  {"b": x["a"]}, {"a": [torch.ones(2)]}):
        assert not same(x, other)


@pytest.mark.slow
def test_a_lost_process_is_replaced(tree, tmp_path):
    """Kill -9 to one of two processes: torchrun restarts both, and they train on within 60 s."""
    out = tmp_path / "two"
    process = start(out, "--data", tree, "--epochs", 12, "--batch-per-process", 2,
                    torchrun=["--standalone", "--nproc_per_node=2", "--max-restarts=2"])
    wait_for(lambda: steps(out), process, out)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    killed, last = time.monotonic(), max(steps(out))
    os.kill(int(children[-1]), signal.SIGKILL)
    wait_for(lambda: max(steps(out), default=0) > last, process, out)
    assert time.monotonic() - killed < 60
    assert process.wait() == 0, text_of(out)
    assert steps(out) == [10, 20, 24]


@pytest.mark.slow
def test_a_signal_saves_and_two_nodes_continue(tree, tmp_path):
    """SIGTERM to the whole process group, loading processes too. Then two torchrun agents with one
    process each continue, until one of the agents gets SIGTERM."""
    out, flags = tmp_path / "out", ["--data", tree, "--epochs", 100, "--batch-per-process", 2,
                                    "--save-every", 60]
    process = start(out, *flags)
    wait_for(lambda: steps(out), process, out)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 75 and (out / "requeue").exists()
    assert "stopped by a signal, saved at step " in text_of(out)
    (epoch, used), step = state_of(out)["position"], state_of(out)["step"]
    assert (step, used) == (5 * epoch + used // 2, used) and step >= 10

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cores = (sorted(os.sched_getaffinity(0)) * 2)[:2]       # a core for each node
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
               "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=1",
               "pretrain.py", "--out", str(out), *SHORT, *map(str, flags)]
    agents = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True,
                               preexec_fn=partial(os.sched_setaffinity, 0, {core}))
              for core in cores]
    last = (step // 10 + 1) * 10
    while last not in steps(out):
        assert all(agent.poll() is None for agent in agents), [a.communicate()[0] for a in agents]
        time.sleep(0.05)
    agents[0].terminate()       # torchrun passes it to its process, which tells the other one
    text = "".join(agent.communicate(timeout=60)[0] for agent in agents)
    assert f"continuing {out / 'checkpoint.pt'} at step {step} of " in text
    assert "it ran on 1 process(es) and now runs on 2" in text
    assert "stopped by a signal, saved at step " in text
    saved = state_of(out)["step"]
    assert saved >= last
    assert steps(out) == list(range(10, saved + 1, 10))     # no line twice, and none lost


def left_of(process):
    """The processes of its group that are still there after 5 s."""
    deadline = time.monotonic() + 5
    while helpers_of(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    return helpers_of(process)


@pytest.mark.slow
def test_ctrl_c_saves(tree, tmp_path):
    """SIGINT to the whole process group, as a terminal sends it, loading processes too. The same
    command then ends with the weights of a run that nobody stops."""
    flags = ["--data", tree, "--epochs", 4, "--batch-per-process", 2, "--save-every", 60]
    out, whole = tmp_path / "out", tmp_path / "whole"
    process = start(out, *flags)
    undisturbed = start(whole, *flags)
    wait_for(lambda: steps(out), process, out)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == INTERRUPTED and left_of(process) == []
    assert "stopped by Ctrl-C, saved at step " in text_of(out)
    assert "Traceback" not in text_of(out) and not (out / "requeue").exists()
    assert start(out, *flags).wait() == undisturbed.wait() == 0
    stopped, never = state_of(out), state_of(whole)
    assert all(same(stopped[name], never[name]) for name in ("model", "optimizer", "step"))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tree, tmp_path):
    """The step that would have to end first takes seconds."""
    out = tmp_path / "out"
    process = start(out, "--data", tree, "--epochs", 9, "--batch-per-process", 4, "--size", 96,
                    "--frames", 24, "--fps", 24)
    wait_for(lambda: (out / "log.jsonl").exists(), process, out)
    for _ in range(2):
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
    assert process.wait(2) == INTERRUPTED and left_of(process) == []
    assert "ended by a signal after Ctrl-C" in text_of(out) and "Traceback" not in text_of(out)


@pytest.mark.slow
def test_ctrl_c_under_torchrun_saves(tree, tmp_path):
    """torchrun alone gets it from the terminal, and passes it on to its processes."""
    out = tmp_path / "two"
    process = start(out, "--data", tree, "--epochs", 100, "--batch-per-process", 2,
                    torchrun=["--standalone", "--nproc_per_node=2"])
    wait_for(lambda: steps(out), process, out)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 1
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert text_of(out).count("stopped by Ctrl-C, saved at step ") == 1
    assert text_of(out).count("Traceback") == 1 and "SignalException" in text_of(out)  # torchrun's
    assert state_of(out)["step"] >= 10 and not (out / "requeue").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["scan", "retrieval.py", "finetune.py"])
def test_ctrl_c_ends_other_work_with_one_line(script, tree, brief, tmp_path):
    """A file that never gives a byte, a named pipe, holds up the scan or the evaluation."""
    if script == "scan":
        (tmp_path / "films").mkdir()
        os.mkfifo(tmp_path / "films" / "a.mp4")
        script, args = "pretrain.py", ["--data", tmp_path / "films", "--out", tmp_path / "out"]
    else:
        rows = [row for row in scan.scan(tree)]
        held = next(row for row in rows if row["split"] == "test")
        held["path"] = str(tmp_path / "a.mp4")
        os.mkfifo(held["path"])
        scan.write(rows, tmp_path / "m.csv")
        args = ["--data", tmp_path / "m.csv", "--checkpoint", brief]
        if script == "finetune.py":
            args += ["--linear", "--arch", "r2plus1d_10", "--size", 16, "--frames", 4, "--fps", 4,
                     "--out", tmp_path / "out", "--train-clips", 1, "--test-clips", 1]
    output = open(tmp_path / "text", "w")
    # Where the tests run as a background job, their processes would ignore SIGINT.
    process = subprocess.Popen([sys.executable, script, *map(str, args)], cwd=ROOT, stdout=output,
                               stderr=output, start_new_session=True,
                               preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))
    text = lambda: (tmp_path / "text").read_text()
    while not {"evaluating", "scanning"} & set(text().replace(":", " ").split()):
        assert process.poll() is None, text()
        time.sleep(0.05)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == INTERRUPTED, text()
    assert text().count("stopped by Ctrl-C; the same command goes on from what is saved\n") == 1
    assert "Traceback" not in text() and left_of(process) == []


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_all(tree, tmp_path):
    done = run("--data", tree, "--out", tmp_path, *SMALL, "--batch-per-process", "2",
               "--lr", "1e30", "--epochs", "8", processes=2, check=False)
    assert done.returncode == 1
    sentences = [line for line in done.stderr.splitlines()
                 if line.startswith("error") and "loss nan at step " in line]
    assert sentences, done.stderr[-3000:]
    for part in (".mp4", "learning rate ", "there is no checkpoint yet"):
        assert all(part in line for line in sentences), done.stderr[-3000:]
    assert len(log_of(tmp_path)[-1]["files"]) == 4 and not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name,dtype", [("bf16", "bfloat16"), ("fp16", "float16"),
                                        ("fp32", "float32")])
def test_each_precision_trains(name, dtype, tree, tmp_path):
    for chunk in ([], ["--chunk", "2"]):
        out = tmp_path / f"out{len(chunk)}"
        assert run_here(pretrain, "--data", tree, "--out", out, *SMALL, "--epochs", "1",
                        "--frames", "2", "--precision", name, *chunk) == 0
        head, line = log_of(out)
        assert head["precision"] == dtype and 0 < line["loss"] < 20
        assert (line["skipped"] > 0) == (name == "fp16")    # the first scale is too great


@pytest.mark.parametrize("share,stopped", [(0.03, 0), (0.1, 1000)])
def test_runs_stop_if_clearly_more_clips_fail_than_allowed(share, stopped):
    """Of 1,000 runs none stops at 3 % with a limit of 5 %, and at 10 % all stop within 1,000 clips.

    As in a run, 80 clips are read between two looks, and each that fails is replaced.
    """
    rng, found = np.random.default_rng(0), 0
    for _ in range(1000):
        failed = drawn = 0
        while drawn < (1000 if stopped else 20_000) - 80:
            new = rng.negative_binomial(80, 1 - share)
            failed, drawn = failed + new, drawn + 80 + new
            if clearly_more(failed, drawn, 0.05):
                found += 1
                break
    assert found == stopped


def test_the_bound_on_failures():
    """It is never below the binomial tail, and the ends of its range have an answer."""
    for limit, drawn in ((0.05, 40), (0.3, 25)):
        terms = torch.distributions.Binomial(drawn, torch.tensor(limit, dtype=torch.float64))
        tail = terms.log_prob(torch.arange(drawn + 1.)).exp().flip(0).cumsum(0).flip(0)
        for failed in range(drawn + 1):
            if clearly_more(failed, drawn, limit):
                assert tail[failed] < 0.02
        assert clearly_more(drawn, drawn, limit) and not clearly_more(0, drawn, limit)
    assert clearly_more(1, 1000, 0.0) and not clearly_more(0, 1000, 0.0)
    assert not clearly_more(1, 8, 0.05)                     # one of the first clips is no reason


def test_too_many_failures_save_first(tmp_path):
    """Half of the clips fail. The count is that of clips drawn, and begins anew with each start."""
    for begun in (0, 10):
        trainer, _ = numbers_run(tmp_path, torch.nn.Linear(1, 1))
        trainer.args.save_every = 60
        assert trainer.step == begun
        with pytest.raises(ValueError) as stop:
            for _ in trainer:
                trainer.newly_replaced += 2                 # each of two clips was replaced once
                trainer.log(loss=torch.tensor(1.0), lr=0.01)
        step = begun + 10
        assert str(stop.value).startswith("20 of the 40 clips drawn since the start could not be ")
        assert f"the checkpoint of step {step} is kept" in str(stop.value)
        state = state_of(tmp_path)
        assert state["step"] == step and state["replaced"] == 2 * step


@pytest.mark.slow
def test_kept_checkpoints_can_be_used(tree, tmp_path, capsys):
    """They hold the weights of their epoch, and keeping them does not change the training."""
    flags = ["--data", tree, *SMALL, "--batch-per-process", 5]
    plain, kept = tmp_path / "plain", tmp_path / "kept"
    assert run_here(pretrain, *flags, "--out", plain) == 0
    assert run_here(pretrain, *flags, "--out", kept, "--keep-every", 2) == 0
    assert sorted(path.name for path in kept.glob("checkpoint*")) == [
        "checkpoint-2.pt", "checkpoint-4.pt", "checkpoint.pt"]
    assert [line["step"] for line in log_of(kept)[1:]] == [4, 8]
    second = torch.load(kept / "checkpoint-2.pt", weights_only=True)
    assert second["step"] == 4 and same(state_of(plain)["model"], state_of(kept)["model"])
    assert not same(second["model"], state_of(kept)["model"])
    shutil.copy(kept / "checkpoint-2.pt", kept / "checkpoint.pt")       # and train on from there
    assert run_here(pretrain, *flags, "--out", kept, "--keep-every", 1) == 0
    assert same(state_of(plain)["model"], state_of(kept)["model"])
    assert (kept / "checkpoint-3.pt").exists()
    checkpoint = kept / "checkpoint-2.pt"
    assert run_here(retrieval, "--checkpoint", checkpoint, "--clips", 1) == 0
    assert json.loads((kept / "retrieval-2.json").read_text())["checkpoint"] == str(checkpoint)
    assert run_here(finetune, "--data", tree, "--checkpoint", checkpoint, "--arch", "r2plus1d_10",
                    "--linear", "--frames", 4, "--fps", 8, "--size", 16, "--train-clips", 1,
                    "--test-clips", 1, "--workers", 1, "--out", tmp_path / "linear") == 0


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 200 MB, where there is room for one checkpoint of 146 MB and not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user cannot mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_small_disk_that_is_full(tree, small_disk, capsys):
    """The second checkpoint does not fit. One sentence says so, and the first one can be used."""
    flags = ["--data", tree, "--out", small_disk / "run", *SHORT, "--epochs", 6,
             "--batch-per-process", 4]
    assert run_here(pretrain, *flags) == 1
    error, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "checkpoint.pt (No space left on device): make room, then give the same comm" in error
    assert "the checkpoint of step 10 is kept" in error
    assert state_of(small_disk / "run")["step"] == 10 and not list(small_disk.rglob("*.part"))
    subprocess.run(["mount", "-o", "remount,size=400m", str(small_disk)], check=True)
    assert run_here(pretrain, *flags) == 0
    assert state_of(small_disk / "run")["step"] == 12


def test_a_folder_that_cannot_be_written(tree, capsys):
    """Also if root runs the tests: without root's rights for the time being."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)
        assert run_here(pretrain, "--data", tree, "--out", folder / "run", *SMALL) == 1
    finally:
        os.seteuid(user)
        folder.rmdir()
    assert capsys.readouterr().err == (f"error: --out {folder / 'run'} cannot be written "
                                       "(Permission denied): mend that, or give another --out\n")


def test_a_full_disk_leaves_the_last_checkpoint(tree, tmp_path, capsys):
    write_atomic(b"good", tmp_path / "a.pt")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))    # as if the disk were full there
    try:
        with pytest.raises(OSError, match=r"cannot write .*a.pt \(File too large\): make room, "
                                          "then give the same command again"):
            write_atomic(bytes(2_000_000), tmp_path / "a.pt")
        status = run_here(pretrain, "--data", tree, "--out", tmp_path / "run", *SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "a.pt").read_bytes() == b"good"
    os.link(tmp_path / "a.pt", tmp_path / "b.pt")
    write_atomic(b"better", tmp_path / "a.pt")              # a new file takes the name of the old
    assert (tmp_path / "a.pt").read_bytes() == b"better"
    assert (tmp_path / "b.pt").read_bytes() == b"good"
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(errors) == 1
    assert "checkpoint.pt" in errors[0] and "make room" in errors[0]
    assert "there is no checkpoint yet" in errors[0]
    assert not list(tmp_path.rglob("*.part"))


def test_the_log_is_cut_where_the_checkpoint_ends(tmp_path):
    log, lines = tmp_path / "log.jsonl", '{"args": 1}\n{"step": 10}\n'
    log.write_text(lines + '{"step": 20}\n{"step": 3')
    truncate_log(log, len(lines))
    assert log.read_text() == lines
    truncate_log(log, 1000)                                 # a shorter log stays as it is
    assert log.read_text() == lines
    truncate_log(tmp_path / "missing.jsonl", 1000)
    assert not (tmp_path / "missing.jsonl").exists()


def test_damaged_and_foreign_checkpoints(tree, tmp_path, capsys):
    torch.save({"settings": {}}, tmp_path / "lacking.pt")
    torch.save(dict.fromkeys(("args", "clips", "at", "processes", "optimizer", "scaler"), {})
               | {"model": {}}, tmp_path / "earlier.pt")
    for content, sentence in (
            ((tmp_path / "lacking.pt").read_bytes(), "no checkpoint.pt of this project: it lacks"),
            ((tmp_path / "earlier.pt").read_bytes(), "was written by an earlier version of this"),
            (b"PK\x03\x04 cut off", "truncated, or another program wrote it, or it carries code")):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        assert run_here(pretrain, "--data", tree, "--out", tmp_path, *SMALL) == 1
        errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert len(errors) == 1 and sentence in errors[0]
        assert (tmp_path / "checkpoint.pt").read_bytes() == content


@pytest.mark.slow
def test_processes_that_see_different_checkpoints_stop(tree, tmp_path):
    """As on nodes whose --out is not shared: one has a checkpoint, the other has none."""
    flags = ["--data", tmp_path / "manifest.csv", *SMALL, "--batch-per-process", "2"]
    scan.write(scan.scan(tree / "train"), tmp_path / "manifest.csv")
    assert run_here(pretrain, *flags, "--out", tmp_path / "0") == 0
    script = tmp_path / "unshared.py"
    script.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                      f"sys.argv += ['--out', {str(tmp_path)!r} + '/' + os.environ['RANK']]\n"
                      "import pretrain\npretrain.launch(pretrain.train, pretrain.parse())\n")
    done = run(*flags, processes=2, script=script, check=False)
    assert done.returncode != 0
    assert "the processes see different checkpoints or data: is --out" in done.stderr
