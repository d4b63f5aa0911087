"""support/run.py: runs that are killed, pre-empted, out of disk space, or diverge."""

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
from conftest import ROOT, SMALL, Job, free_port, log_of, run, run_here, write_script

import finetune
import pretrain
import retrieval
from data import Row, make_loader
from prepare import scan
from support.processes import INTERRUPTED
from support.run import REQUEUE, Run, clearly_more, fingerprint, lock_folder, write_atomic

SHORT = [*SMALL, "--batch-per-process", "2", "--save-every", "0"]   # saves at each line of the log
exact = partial(torch.testing.assert_close, rtol=0, atol=0)


def steps(out):
    """The step numbers in OUT/log.jsonl."""
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line)["step"] for line in lines[1:] if line.endswith("}")]


def state_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same_state(one, other):
    """Weights, momentum and position of two runs are equal, to the bit."""
    first, second = state_of(one), state_of(other)
    for name in ("model", "optimizer", "scaler", "position", "step", "replaced", "skipped"):
        exact(first[name], second[name], msg=name)


def events(out):
    """{step: line of OUT/log.jsonl}, without the values that depend on the clock."""
    return {line["step"]: {name: value for name, value in line.items()
                           if name not in ("clips_per_s", "wait")} for line in log_of(out)[1:]}


# ---- runs in this process, of 20 steps, five an epoch, of which each tenth is logged and saved

class Numbers(torch.utils.data.Dataset):
    """Ten clips that are numbers."""

    clips_per_file, seed = None, 0
    rows = [Row(f"{n}.mp4", "a", "train", 1.0, 1.0, True, "") for n in range(10)]

    def __len__(self):
        return 10

    def __getitem__(self, key):
        return torch.tensor([1.0 + key[1]]), torch.tensor(0.0), (f"{key[1]}.mp4", [])


def numbers_run(out, model=None, scaling=False):
    """A Run over Numbers, with a gradient scaler if `scaling`."""
    model = model or torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    args = Namespace(epochs=4, save_every=0.0, keep_every=None, max_failures=0.05, seed=0,
                     out=str(out))
    lock_folder(out)
    loader = make_loader(Numbers(), 2, workers=0, epochs=4)
    return Run(args, loader, model, optimizer, torch.amp.GradScaler("cpu", enabled=scaling), {})


def train(out, stop_at=None, number=None, scaling=False):
    """Train on Numbers. While a step is computed, a signal comes or, without a number, the run
    breaks off. Returns the Run."""
    torch.manual_seed(0)
    trainer = numbers_run(out, scaling=scaling)
    for _, (x, _) in trainer:
        loss = (trainer.model(x) - 1).square().mean()
        trainer.optimizer.zero_grad()
        loss.backward()
        trainer.optimizer.step()
        trainer.log(loss=loss, lr=0.001)
        if trainer.step + 1 == stop_at and number:
            os.kill(os.getpid(), number)
        elif trainer.step + 1 == stop_at:
            break
    return trainer


@pytest.mark.parametrize("number,status,cause", [
    (signal.SIGTERM, 75, "a signal"), (signal.SIGUSR1, 75, "a signal"),
    (signal.SIGINT, 130, "Ctrl-C")])
def test_a_signal_saves_in_mid_epoch(number, status, cause, tmp_path, capsys):
    """The same command then ends with the weights of a run that nobody stops."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole)
    with pytest.raises(SystemExit) as stop:
        train(cut, 12, number)
    assert stop.value.code == status and (cut / "requeue").exists() == (status == REQUEUE)
    assert (f"stopped by {cause}, saved at step 13 of 20: the same command continues from that "
            "step\n" in capsys.readouterr().out)
    assert state_of(cut)["position"] == (2, 6)
    train(cut)
    assert f"continuing {cut / 'checkpoint.pt'} at step 13 of 20\n" in capsys.readouterr().out
    assert_same_state(whole, cut)
    assert steps(cut) == [10, 20] and not (cut / "requeue").exists()


def test_the_log_is_cut_where_the_checkpoint_ends(tmp_path):
    """Lines that follow the checkpoint's come again. A log that was deleted is no hindrance."""
    train(tmp_path / "whole")
    for name, later in (("cut", '{"step": 20}\n{"step": 3'), ("same", ""), ("deleted", None)):
        out = tmp_path / name
        train(out, stop_at=11)
        if later is None:
            (out / "log.jsonl").unlink()
        else:
            with open(out / "log.jsonl", "a") as log:
                log.write(later)
        train(out)
        if later is None:
            assert json.loads((out / "log.jsonl").read_text())["step"] == 20
        else:
            assert events(out) == events(tmp_path / "whole") and steps(out) == [10, 20]
        assert_same_state(out, tmp_path / "whole")


def test_a_run_of_other_processes_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(tmp_path, 5, signal.SIGTERM)
    torch.save(state_of(tmp_path) | {"world_size": 2}, tmp_path / "checkpoint.pt")
    train(tmp_path)
    assert ("at step 6 of 20; it ran on 2 process(es) and now runs on 1, in global batches of 2, "
            "so the weights will not be the same to the bit\n" in capsys.readouterr().out)


@pytest.mark.parametrize("before,after", [(False, True), (True, False), (True, True)])
def test_a_run_continues_in_another_precision(before, after, tmp_path):
    """From bfloat16, without a gradient scaler, to float16 with one, and the other ways."""
    model = train(tmp_path, stop_at=11, scaling=before).model
    again = numbers_run(tmp_path, torch.nn.Linear(1, 1), after)
    assert again.step == 10 and not again.model.weight.equal(model.weight)      # of step 11
    exact(again.model.state_dict(), state_of(tmp_path)["model"])


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The loss is finite, its gradient at zero is not: the run stops and saves nothing of it."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    trainer = numbers_run(tmp_path, model)
    message = "weights that are not finite after step 10, learning rate 0.01: there is no check"
    with pytest.raises(FloatingPointError, match=message):
        for n, (_, (x, _)) in enumerate(trainer):
            loss = model(x).abs().sqrt().mean() if n == 0 else torch.tensor(1.0)
            if n == 0:
                loss.backward()
                trainer.optimizer.step()
            trainer.log(loss=loss, lr=0.01)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_batch_whose_loss_is_not_finite_is_named(tmp_path):
    """Step 7 has the bad loss. The message and the log name its two files, not those of step 10."""
    trainer, batches = numbers_run(tmp_path), []
    with pytest.raises(FloatingPointError) as stop:
        for n, (_, (x, _)) in enumerate(trainer, 1):
            batches.append([f"{int(value) - 1}.mp4" for value in x.flatten()])
            trainer.log(loss=torch.tensor(float("nan") if n == 7 else 1.0), lr=0.01 * n)
    sentence = f"loss nan at step 7, learning rate 0.07, batch {', '.join(batches[6])}: "
    assert sentence in str(stop.value)
    assert log_of(tmp_path)[-1]["files"] == batches[6]


def test_the_log_has_means(tmp_path):
    """Loss and other tensors are means over the ten steps of a line, numbers those of the last."""
    trainer = numbers_run(tmp_path)
    for n, _ in enumerate(trainer, 1):
        trainer.log(loss=torch.tensor(float(n)), top1=torch.tensor(0.1 * n), lr=0.01 * n)
    lines = log_of(tmp_path)[1:]
    assert [line["step"] for line in lines] == [10, 20]
    assert [line["loss"] for line in lines] == [5.5, 15.5]
    assert [line["top1"] for line in lines] == pytest.approx([0.55, 1.55])
    assert [line["lr"] for line in lines] == pytest.approx([0.1, 0.2])


def test_too_many_failures_save_first(tmp_path):
    """Half of the clips fail. The count is that of clips drawn, and begins anew with each start."""
    for begun in (0, 10):
        trainer = numbers_run(tmp_path)
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


def test_fingerprint_tells_data_sets_apart():
    def of(*names_and_labels):
        return fingerprint([Row(path, label, "train", 1.0, 1.0, True, "")
                            for path, label in names_and_labels])

    one = of(("/here/a.mp4", "bell"), ("/here/b.mp4", "drum"))
    assert one == of(("/moved/a.mp4", "bell"), ("/moved/b.mp4", "drum"))
    others = (of(("/here/a.mp4", "drum"), ("/here/b.mp4", "drum")),
              of(("/here/c.mp4", "bell"), ("/here/b.mp4", "drum")))
    assert len({one, *others}) == 3


# ---- processes that are killed or get signals

def helpers_of(pid):
    """The numbers of the other processes of its group: loading processes, and their server."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):                 # it has ended
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            if int(group) == pid and state != "Z":
                found.append(int(path.parent.name))
    return [number for number in found if number != pid]


def left_of(pid, seconds=5):
    """The processes of its group that are still there after some seconds."""
    deadline = time.monotonic() + seconds
    while helpers_of(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return helpers_of(pid)


@pytest.fixture(scope="module")
def manifest(tree, tmp_path_factory):
    """The manifest of the tree's ten training films, so that no run scans them."""
    path = tmp_path_factory.mktemp("manifest") / "train.csv"
    scan.write(scan.scan(tree / "train"), path)
    return path


def start(data, out, *flags, **how):
    """Start pretrain.py. Returns a Job."""
    return Job("pretrain.py", "--data", data, "--out", out, *SHORT, *flags, **how)


@pytest.mark.slow
def test_killed_and_stopped_runs_end_with_the_same_weights(manifest, tmp_path):
    """Kill -9 comes after checkpoints and within steps, once for each way to start the loading
    processes. Then Ctrl-C comes to the whole process group, as a terminal sends it. The lock that
    each leaves is no hindrance. The run that nobody stops has another core at the same time."""
    whole, cut, flags = tmp_path / "whole", tmp_path / "cut", ("--epochs", 12)
    core, other = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    undisturbed = start(manifest, whole, *flags, core=other)
    for least, method in ((10, "fork"), (20, "forkserver"), (30, "spawn")):
        job = start(manifest, cut, *flags, method=method, core=core)
        job.wait_for(lambda: max(steps(cut), default=0) >= least
                     and (cut / "checkpoint.pt").exists())
        time.sleep(0.2 * (least == 30))
        assert helpers_of(job.pid)
        os.kill(job.pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
        assert left_of(job.pid, 30) == [], "a killed run leaves processes behind"
        assert ("continuing " in job.printed()[0]) == (least > 10)
    job = start(manifest, cut, *flags, "--save-every", 60, core=core)
    job.wait_for(lambda: max(steps(cut)) >= 40)
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(60) == INTERRUPTED and left_of(job.pid) == []
    text, errors = job.printed()
    step = state_of(cut)["step"]
    assert f"stopped by Ctrl-C, saved at step {step} of 60: " in text and "Traceback" not in errors
    assert not (cut / "requeue").exists()
    job = start(manifest, cut, *flags, core=core)
    assert job.wait() == undisturbed.wait() == 0, job.printed()
    assert f"continuing {cut / 'checkpoint.pt'} at step {step} of 60\n" in job.printed()[0]
    assert_same_state(whole, cut)
    (lines, expected), broken = map(events, (cut, whole)), step // 10 * 10 + 10
    assert lines.keys() == expected.keys() == set(range(10, 61, 10))
    assert all(lines[n] == expected[n] for n in lines if n != broken)   # means of fewer steps


@pytest.mark.slow
def test_a_signal_to_the_group_saves_and_leaves_the_mark(manifest, tmp_path, capsys):
    """The loading processes and the server that forks them get the signal first, and do not mind.
    While the run lives, no other run has its --out. The next start removes the mark."""
    flags, cores = ("--epochs", 400, "--save-every", 60), os.sched_getaffinity(0)
    jobs = [(number, out, start(manifest, out, *flags, method=out.name, core=core))
            for number, out, core in ((signal.SIGTERM, tmp_path / "forkserver", min(cores)),
                                      (signal.SIGUSR1, tmp_path / "spawn", max(cores)))]
    for number, out, job in jobs:
        again = ["--data", manifest, "--out", out, *SHORT]
        job.wait_for(lambda: steps(out))
        assert run_here(pretrain, *again) == 1
        owner = f"process {job.pid} on {socket.gethostname()}"
        assert f"in use by {owner}: wait until it has ended" in capsys.readouterr().err
        helpers = helpers_of(job.pid)
        assert len(helpers) >= 2
        for helper in helpers:
            os.kill(helper, number)
        last = max(steps(out))
        job.wait_for(lambda: max(steps(out)) > last)
        os.killpg(job.pid, number)
        assert job.wait(60) == REQUEUE
        text, errors = job.printed()
        assert "Traceback" not in errors and (out / "requeue").exists()
        assert f"stopped by a signal, saved at step {state_of(out)['step']} of " in text
        assert run_here(pretrain, *again) == 1              # other --epochs
        assert "epochs was 400 and is 4" in capsys.readouterr().err
        assert not (out / "requeue").exists()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(manifest, tmp_path):
    """The step that would have to end first takes seconds."""
    job = start(manifest, tmp_path, "--size", 96, "--frames", 24, "--fps", 24)
    job.wait_for((tmp_path / "log.jsonl").exists)
    for _ in range(2):
        time.sleep(0.2)
        os.killpg(job.pid, signal.SIGINT)
    assert job.wait(2) == INTERRUPTED and left_of(job.pid) == []
    errors = job.printed()[1]
    assert "ended by a signal after Ctrl-C" in errors and "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("script", ["scan", "retrieval.py", "finetune.py"])
def test_ctrl_c_ends_other_work_with_one_line(script, tree, brief, tmp_path):
    """A file that never gives a byte, a named pipe, holds up the scan or the evaluation."""
    if script == "scan":
        (tmp_path / "films").mkdir()
        os.mkfifo(tmp_path / "films" / "a.mp4")
        script, args = "pretrain.py", ["--data", tmp_path / "films", "--out", tmp_path / "out"]
    else:
        rows = scan.scan(tree)
        held = next(row for row in rows if row["split"] == "test")
        held["path"] = str(tmp_path / "a.mp4")
        os.mkfifo(held["path"])
        scan.write(rows, tmp_path / "m.csv")
        args = ["--data", tmp_path / "m.csv", "--checkpoint", brief]
        if script == "finetune.py":
            args += ["--linear", "--arch", "r2plus1d_10", "--size", 16, "--frames", 4, "--fps", 4,
                     "--out", tmp_path / "out", "--train-clips", 1, "--test-clips", 1]
    job = Job(script, *args)
    job.wait_for(lambda: {"evaluating", "scanning"}
                 & set("".join(job.printed()).replace(":", " ").split()))
    time.sleep(2)
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(60) == INTERRUPTED, job.printed()
    errors = job.printed()[1]
    assert errors.count("stopped by Ctrl-C; the same command goes on from what is saved\n") == 1
    assert "Traceback" not in errors and left_of(job.pid) == []


def torchrun(data, out, *words, **how):
    """Start pretrain.py with a training of 40 epochs under torchrun, which gets these flags."""
    output = open(out.with_suffix(".txt"), "a")
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *words, "pretrain.py",
                             "--data", data, "--out", out, *SHORT, "--epochs", "40"],
                            cwd=ROOT, stdout=output, stderr=output,
                            env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, **how)


def wait_for_step(out, step, *agents):
    """Wait until a step is in the log, while the agents of torchrun live."""
    while max(steps(out), default=0) < step:
        assert all(agent.poll() is None for agent in agents), out.with_suffix(".txt").read_text()
        time.sleep(0.02)


@pytest.mark.slow
def test_torchrun_replaces_a_lost_process_and_passes_ctrl_c_on(manifest, tmp_path):
    """Kill -9 to one of two processes: torchrun restarts both, and they train on within 60 s. From
    a terminal torchrun alone gets Ctrl-C. The same command ends the run."""
    out = tmp_path / "two"
    agent = torchrun(manifest, out, "--standalone", "--nproc_per_node=2", "--max-restarts=2")
    children = lambda: Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    wait_for_step(out, 10, agent)
    killed, last = time.monotonic(), max(steps(out))
    os.kill(int(children()[-1]), signal.SIGKILL)
    wait_for_step(out, last + 1, agent)
    assert time.monotonic() - killed < 60
    workers, before = children(), out.with_suffix(".txt").read_text()
    agent.send_signal(signal.SIGINT)
    assert agent.wait(60) == 1 and not any(Path(f"/proc/{worker}").exists() for worker in workers)
    text = out.with_suffix(".txt").read_text()[len(before):]
    assert text.count("stopped by Ctrl-C, saved at step ") == 1
    assert text.count("Traceback") == 1 and "SignalException" in text       # torchrun's
    step = state_of(out)["step"]
    assert step > last and not (out / "requeue").exists()
    done = run("--data", manifest, "--out", out, *SHORT, "--epochs", 40, "--save-every", 60,
               processes=2)
    assert f"at step {step} of 80\n" in done.stdout
    assert steps(out) == list(range(10, 81, 10))            # no line twice, and none lost


@pytest.mark.slow
def test_two_nodes_continue(manifest, tmp_path, monkeypatch):
    """A run of one process is stopped in mid-epoch. Then two torchrun agents with one process each
    continue, until one of the agents gets SIGTERM."""
    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return torch.tensor(0.0)

    out = tmp_path / "out"
    monkeypatch.setattr(pretrain, "top1", stop)
    assert run_here(pretrain, "--data", manifest, "--out", out, *SHORT, "--epochs", 40) == REQUEUE
    step = state_of(out)["step"]
    assert state_of(out)["position"] == (0, 2 * step) and step < 5
    nodes = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=1",
             f"--rdzv_endpoint=localhost:{free_port()}"]
    cores = (sorted(os.sched_getaffinity(0)) * 2)[:2]       # a core for each node
    agents = [torchrun(manifest, out, *nodes, preexec_fn=partial(os.sched_setaffinity, 0, {core}))
              for core in cores]
    wait_for_step(out, 10, *agents)
    agents[0].terminate()       # torchrun passes it to its process, which tells the other one
    for agent in agents:
        agent.wait(60)
    text = out.with_suffix(".txt").read_text()
    assert f"continuing {out / 'checkpoint.pt'} at step {step} of " in text
    assert "it ran on 1 process(es) and now runs on 2" in text
    assert "stopped by a signal, saved at step " in text
    assert steps(out) == list(range(10, state_of(out)["step"] + 1, 10))     # none twice or lost


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_all(manifest, tmp_path):
    done = run("--data", manifest, "--out", tmp_path, *SMALL, "--batch-per-process", "2",
               "--lr", "1e30", processes=2, check=False)
    assert done.returncode == 1
    sentences = [line for line in done.stderr.splitlines()
                 if line.startswith("error") and "loss nan at step " in line]
    assert sentences, done.stderr[-3000:]
    for part in (".mp4", "learning rate ", "there is no checkpoint yet"):
        assert all(part in line for line in sentences), done.stderr[-3000:]
    assert len(log_of(tmp_path)[-1]["files"]) == 4 and not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.slow
def test_processes_that_see_different_checkpoints_stop(manifest, tmp_path):
    """As on nodes whose --out is not shared: one has a checkpoint, the other has none."""
    flags = ["--data", manifest, *SMALL, "--batch-per-process", 2, "--epochs", 1]
    assert run_here(pretrain, *flags, "--out", tmp_path / "0") == 0
    script = write_script(tmp_path / "unshared.py", f"""
        import os, pretrain
        sys.argv += ["--out", {str(tmp_path)!r} + "/" + os.environ["RANK"]]
        pretrain.launch(pretrain.train, pretrain.parse())
        """)
    done = run(*flags, processes=2, script=script, check=False)
    assert done.returncode != 0
    assert "the processes see different checkpoints or data: is --out" in done.stderr


# ---- checkpoints and disks

@pytest.mark.slow
@pytest.mark.parametrize("name,dtype", [("bf16", "bfloat16"), ("fp16", "float16"),
                                        ("fp32", "float32")])
def test_each_precision_trains(name, dtype, manifest, tmp_path):
    for chunk in ([], ["--chunk", "2"]):
        out = tmp_path / f"out{len(chunk)}"
        assert run_here(pretrain, "--data", manifest, "--out", out, *SMALL, "--epochs", "1",
                        "--frames", "2", "--precision", name, *chunk) == 0
        head, line = log_of(out)
        assert head["precision"] == dtype and 0 < line["loss"] < 20
        assert (line["skipped"] > 0) == (name == "fp16")    # the first scale is too great


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
    assert second["step"] == 4
    exact(state_of(kept)["model"], state_of(plain)["model"])
    with pytest.raises(AssertionError):
        exact(second["model"], state_of(kept)["model"])
    shutil.copy(kept / "checkpoint-2.pt", kept / "checkpoint.pt")       # and train on from there
    assert run_here(pretrain, *flags, "--out", kept, "--keep-every", 1) == 0
    exact(state_of(kept)["model"], state_of(plain)["model"])
    assert (kept / "checkpoint-3.pt").exists()
    checkpoint = kept / "checkpoint-2.pt"
    assert run_here(retrieval, "--checkpoint", checkpoint, "--clips", 1) == 0
    assert json.loads((kept / "retrieval-2.json").read_text())["checkpoint"] == str(checkpoint)
    assert run_here(finetune, "--data", tree, "--checkpoint", checkpoint, "--arch", "r2plus1d_10",
                    "--linear", "--frames", 4, "--fps", 8, "--size", 16, "--train-clips", 1,
                    "--test-clips", 1, "--workers", 1, "--out", tmp_path / "linear") == 0


def test_a_folder_that_cannot_be_written(capsys):
    """Also if root runs the tests: without root's rights for the time being."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)
        assert run_here(pretrain, "--data", "x", "--out", folder / "run") == 1
    finally:
        os.seteuid(user)
        folder.rmdir()
    assert capsys.readouterr().err == (f"error: --out {folder / 'run'} cannot be written "
                                       "(Permission denied): mend that, or give another --out\n")


@pytest.mark.parametrize("room,kept", [(0, "there is no checkpoint yet"),
                                       (10, "the checkpoint of step 10 is kept")])
def test_a_full_disk_leaves_the_last_checkpoint(room, kept, tmp_path):
    """There is no room for a checkpoint after step `room`. With room the run goes on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError) as stop:
            for n, _ in enumerate(trainer := numbers_run(tmp_path)):
                if n == room:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
                trainer.log(loss=torch.tensor(1.0), lr=0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(stop.value) == (f"cannot write {tmp_path / 'checkpoint.pt'} (File too large): make "
                               f"room, then give the same command again; {kept}")
    assert not list(tmp_path.rglob("*.part"))
    assert (state_of(tmp_path)["step"] if room else 0) == room
    train(tmp_path)
    assert state_of(tmp_path)["step"] == 20


def test_an_atomic_file_is_another_file(tmp_path):
    write_atomic(b"good", tmp_path / "a.pt")
    os.link(tmp_path / "a.pt", tmp_path / "b.pt")
    write_atomic(b"better", tmp_path / "a.pt")              # a new file takes the name of the old
    assert (tmp_path / "a.pt").read_bytes() == b"better"
    assert (tmp_path / "b.pt").read_bytes() == b"good"


@pytest.mark.parametrize("state,sentence", [
    ({"settings": {}}, "no checkpoint.pt of this project: it lacks"),
    (dict.fromkeys(("args", "clips", "at", "processes", "optimizer", "scaler", "model"), {}),
     "was written by an earlier version of this"),
    (None, "truncated, or another program wrote it, or it carries code")])
def test_damaged_and_foreign_checkpoints(state, sentence, tmp_path):
    if state:
        torch.save(state, tmp_path / "checkpoint.pt")
    else:
        (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 cut off")
    content = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=sentence):
        numbers_run(tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == content
