"""support/run.py: runs that are killed, pre-empted, out of disk space, or diverge."""

import errno
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, Job, free_port, log_of, run_here

import pretrain
import retrieval
from data import make_loader
from prepare import scan
from prepare.scan import Row
from support import run
from support.processes import INTERRUPTED
from support.run import REQUEUE, Run, clearly_more, fingerprint, lock_folder

SHORT = [*SMALL, "--batch-per-process", "2", "--save-every", "0"]   # saves at each line of the log
SIGNALS = [(signal.SIGTERM, REQUEUE, "a signal"), (signal.SIGUSR1, REQUEUE, "a signal"),
           (signal.SIGINT, INTERRUPTED, "Ctrl-C")]


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
    for name in ("model", "optimizer", "position", "step", "replaced", "skipped"):
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)


def events(out):
    """{step: line of OUT/log.jsonl}, without the values that depend on the clock."""
    return {line["step"]: {name: value for name, value in line.items()
                           if name not in ("clips_per_s", "wait")} for line in log_of(out)[1:]}


# ---- runs in this process

class Numbers(torch.utils.data.Dataset):
    """Ten clips that are numbers."""

    clips_per_file, seed, failures = None, 0, []
    rows = [Row(f"{n}.mp4", "a", "train", 1.0, 1.0, True, "") for n in range(10)]

    def __len__(self):
        return 10

    def __getitem__(self, key):
        return torch.tensor([1.0 + key[1]]), torch.tensor(0.0), (f"{key[1]}.mp4", self.failures)


def train(out, during=None, scaling=False, save_every=0.0):
    """Train on Numbers: 20 steps, five an epoch, of which each tenth is logged and saved.

    during(n, trainer) is called while step n is computed, and may return another loss for the log.
    scaling: with a gradient scaler.
    """
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=scaling)
    args = Namespace(epochs=4, save_every=save_every, keep_every=None, max_failures=0.05, seed=0,
                     out=str(out))
    lock_folder(out)
    trainer = Run(args, make_loader(Numbers(), 2, 0, 4), model, optimizer, scaler, {})
    for n, (_, (x, _)) in enumerate(trainer, trainer.step + 1):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        other = during(n, trainer) if during else None
        loss = loss if other is None else torch.tensor(other)
        trainer.log(loss=loss, top1=loss / 2, lr=0.01 * n)


@pytest.mark.parametrize("number,status,cause", SIGNALS)
def test_a_signal_saves_in_mid_epoch(number, status, cause, tmp_path, capsys):
    """It saves after that step. The same command then ends with the weights of a run that nobody
    stops."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole)
    with pytest.raises(SystemExit) as stopped:
        train(cut, lambda n, _: os.kill(os.getpid(), number) if n == 12 else None)
    assert stopped.value.code == status and (cut / "requeue").exists() == (status == REQUEUE)
    assert (f"stopped by {cause}, saved at step 12 of 20: the same command continues from that "
            "step\n" in capsys.readouterr().out)
    assert state_of(cut)["position"] == (2, 4)
    train(cut)
    assert f"continuing {cut / 'checkpoint.pt'} at step 12 of 20\n" in capsys.readouterr().out
    assert_same_state(whole, cut)
    assert steps(cut) == [10, 20] and not (cut / "requeue").exists()


def test_a_slow_step_is_saved_when_it_is_time(tmp_path):
    """A run does not wait for the next line of the log, which may be ten long steps away."""
    def break_off(n, _):
        if n == 7:
            raise ZeroDivisionError

    train(tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "cut", break_off, save_every=1e-9)
    assert state_of(tmp_path / "cut")["step"] == 6 == max(steps(tmp_path / "cut"))
    train(tmp_path / "cut")
    assert_same_state(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("later,before", [('{"step": 20}\n{"step": 3', True), (None, False)])
def test_a_run_that_breaks_off(later, before, tmp_path):
    """It goes on from the checkpoint of step 10, from bfloat16 without a gradient scaler to float16
    too. Lines of the log that follow the checkpoint come again. A log that was deleted is no
    hindrance."""
    def break_off(n, _):
        if n == 11:
            raise ZeroDivisionError

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, scaling=True)
    with pytest.raises(ZeroDivisionError):
        train(cut, break_off, before)
    log = cut / "log.jsonl"
    if later:
        log.write_text(log.read_text() + later)
    else:
        log.unlink()
    train(cut, scaling=True)
    assert_same_state(whole, cut)
    if later:
        assert state_of(whole)["scaler"] == state_of(cut)["scaler"]
        assert events(cut) == events(whole) and steps(cut) == [10, 20]
    else:
        assert json.loads(log.read_text())["step"] == 20


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """A gradient was infinite, and all losses are finite: the run stops and saves nothing of it."""
    def spoil(_, trainer):
        trainer.model.weight.data.fill_(torch.inf)
        return 1.0

    message = "weights that are not finite after step 10, learning rate 0.1: there is no check"
    with pytest.raises(FloatingPointError, match=message):
        train(tmp_path, spoil)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_batch_whose_loss_is_not_finite_is_named(tmp_path, monkeypatch):
    """Step 7 has the bad loss, on the other one of two processes. The message and the log name the
    files of both, and not those of step 10."""
    def with_another(own):
        if isinstance(own, dict):               # what the processes tell before a line of the log
            return [own, own | {"losses": [1.0] * 6 + [float("nan")] + [1.0] * 3}]
        return [own, own]

    batches = []
    monkeypatch.setattr(run, "gather", with_another)
    with pytest.raises(FloatingPointError) as stop:
        train(tmp_path, lambda n, trainer: batches.append(trainer.files[-1]))
    files = batches[6] * 2
    assert str(stop.value) == (
        f"loss nan at step 7, learning rate 0.07, batch {', '.join(files)}: there is no checkpoint "
        "yet; try a lower --lr and another --out, or look at these files")
    assert log_of(tmp_path)[-1]["files"] == files and len(set(files)) == 2
    assert not (tmp_path / "checkpoint.pt").exists()


def test_checkpoints_of_others_are_refused(tmp_path, monkeypatch):
    """One of another program, and one that another process does not see, as on nodes whose --out is
    not shared."""
    torch.save({"settings": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="no checkpoint.pt of this project: it lacks"):
        train(tmp_path)
    (tmp_path / "checkpoint.pt").unlink()
    train(tmp_path)
    monkeypatch.setattr(run, "gather", lambda own: [own, (0, 0, 0, own[3])])
    with pytest.raises(ValueError, match="the processes see different checkpoints or data: is "
                                         "--out .* on a file system that they share?"):
        train(tmp_path)


def test_the_log_has_means(tmp_path):
    """Of loss and other measures over the ten steps of a line, and the last learning rate."""
    train(tmp_path, lambda n, _: float(n))
    found = [(line["step"], line["loss"], line["top1"], line["lr"])
             for line in log_of(tmp_path)[1:]]
    assert found == [(10, 5.5, 2.75, 0.1), (20, 15.5, 7.75, 0.2)]


def test_too_many_failures_save_first(tmp_path, monkeypatch, capsys):
    """Half of the clips fail. The count is that of clips drawn, and begins anew with each start."""
    monkeypatch.setattr(Numbers, "failures", ["bad.mp4: Invalid data"])
    for step in (10, 20):
        with pytest.raises(ValueError) as stop:
            train(tmp_path, save_every=60)
        assert str(stop.value) == (
            "20 of the 40 clips drawn since the start could not be read, clearly more than "
            "--max-failures 0.05 of them: see the causes above, check the disk and the manifest; "
            f"step {step} is saved")
        assert capsys.readouterr().err.count("replaced: bad.mp4: Invalid data") == 20
        state = state_of(tmp_path)
        assert state["step"] == step and state["replaced"] == 2 * step


@pytest.mark.parametrize("limit,drawn,last", [(0.05, 80, 10), (0.3, 25, 14), (0.0, 1000, 0)])
def test_a_run_stops_if_clearly_more_clips_fail_than_allowed(limit, drawn, last):
    """`last` is the most that may fail of those drawn. More has a probability of less than 1 % by
    the binomial distribution, if clips fail as often as allowed."""
    assert [clearly_more(failed, drawn, limit) for failed in range(drawn + 1)] == [
        failed > last for failed in range(drawn + 1)]
    likely = sum(math.comb(drawn, n) * limit ** n * (1 - limit) ** (drawn - n)
                 for n in range(last + 1))
    assert 1 - likely < 0.01


def test_fingerprint_tells_data_sets_apart():
    one, moved, label, name = (
        fingerprint([Row(path, label, "train", 1.0, 1.0, True, ""), Numbers.rows[0]])
        for path, label in (("/here/a.mp4", "bell"), ("/moved/a.mp4", "bell"),
                            ("/here/a.mp4", "drum"), ("/here/c.mp4", "bell")))
    assert one == moved and len({one, label, name}) == 3


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


def left_of(pid):
    """The processes of its group that are still there after half a minute."""
    deadline = time.monotonic() + 30
    while helpers_of(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return helpers_of(pid)


@pytest.fixture(scope="module")
def manifest(brief):
    """The manifest of the tree with its ten training films, so that no run scans them."""
    return brief.with_name("manifest.csv")


def start(data, out, *flags, **how):
    """Start pretrain.py. Returns a Job."""
    return Job("pretrain.py", "--data", data, "--out", out, *SHORT, *flags, **how)


@pytest.mark.slow
def test_killed_runs_end_with_the_same_weights(manifest, tmp_path):
    """The lock that kill -9 leaves is no hindrance. The run that nobody stops has another core at
    the same time."""
    whole, cut, flags = tmp_path / "whole", tmp_path / "cut", ("--epochs", 8)
    core, other = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    undisturbed = start(manifest, whole, *flags, core=other)
    for least, method in ((10, "fork"), (20, "forkserver")):
        job = start(manifest, cut, *flags, method=method, core=core)
        job.wait_for(lambda: max(steps(cut), default=0) >= least
                     and (cut / "checkpoint.pt").exists())
        assert helpers_of(job.pid)
        os.kill(job.pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
        assert left_of(job.pid) == [], "a killed run leaves processes behind"
    job = start(manifest, cut, *flags, core=core)
    assert job.wait() == undisturbed.wait() == 0, job.printed()
    assert "continuing " in job.printed()[0]
    assert_same_state(whole, cut)
    assert events(whole) == events(cut) and steps(cut) == [10, 20, 30, 40]


@pytest.mark.slow
def test_a_signal_to_the_group_saves(manifest, tmp_path, capsys):
    """The loading processes and the server that forks them get the signal first, and do not mind.
    While the run lives, no other run has its --out. A scheduler's signal, not Ctrl-C, leaves a mark
    that the next start removes."""
    cores = sorted(os.sched_getaffinity(0)) * 3
    jobs = [(tmp_path / method, start(manifest, tmp_path / method, "--epochs", 400, "--save-every",
                                      60, method=method, core=core))
            for method, core in zip(("forkserver", "spawn", "fork"), cores)]
    for (number, status, cause), (out, job) in zip(SIGNALS, jobs):
        again = ["--data", manifest, "--out", out, *SHORT]
        job.wait_for(lambda: steps(out))
        assert run_here(pretrain, *again) == 1
        owner = f"process {job.pid} on {socket.gethostname()}"
        assert f"in use by {owner}: wait until it has ended" in capsys.readouterr().err
        helpers = helpers_of(job.pid)
        assert len(helpers) >= (1 if out.name == "fork" else 2)
        for helper in helpers:
            os.kill(helper, number)
        last = max(steps(out))
        job.wait_for(lambda: max(steps(out)) > last)
        os.killpg(job.pid, number)
        assert job.wait() == status and left_of(job.pid) == []
        text, errors = job.printed()
        assert "Traceback" not in errors and (out / "requeue").exists() == (status == REQUEUE)
        assert f"stopped by {cause}, saved at step {state_of(out)['step']} of " in text
        assert run_here(pretrain, *again) == 1              # other --epochs
        assert "epochs was 400 and is 4" in capsys.readouterr().err
        assert not (out / "requeue").exists()


@pytest.mark.slow
def test_a_loading_process_that_dies_ends_the_run(manifest, tmp_path):
    """A file that crashes the decoder, or a lack of memory, can kill it."""
    job = start(manifest, tmp_path, "--epochs", 400, method="fork")
    job.wait_for(lambda: steps(tmp_path))
    for helper in helpers_of(job.pid):
        os.kill(helper, signal.SIGKILL)
    assert job.wait() == 1 and left_of(job.pid) == []
    errors = job.printed()[1]
    assert "error: DataLoader worker (pid" in errors and "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("at", ["training", "scanning"])
def test_ctrl_c_ends_work_that_hangs_with_one_line(at, tree, tmp_path):
    """Files that never give a byte, named pipes, hold up the work. Training waits for the end of
    its step, to save, until a second Ctrl-C comes."""
    (tmp_path / "films").mkdir()
    rows = scan.scan(tree)
    for n, row in enumerate(rows):
        row["path"] = str(tmp_path / "films" / f"{n}.mp4")
        os.mkfifo(row["path"])
    scan.write(rows, tmp_path / "m.csv")
    data = tmp_path / ("m.csv" if at == "training" else "films")
    job = Job("pretrain.py", "--data", data, "--out", tmp_path / "out", *SMALL)
    job.wait_for(lambda: at in "".join(job.printed()))
    time.sleep(2)
    os.killpg(job.pid, signal.SIGINT)
    if at == "training":
        time.sleep(2)
        os.killpg(job.pid, signal.SIGINT)
    assert job.wait() == INTERRUPTED, job.printed()
    errors = job.printed()[1]
    assert errors.count("ended by a signal after Ctrl-C: the same command continues from the last "
                        "checkpoint\n" if at == "training" else
                        "stopped by Ctrl-C; the same command goes on from what is saved\n") == 1
    assert "Traceback" not in errors and left_of(job.pid) == []


def torchrun(data, out, *words, **how):
    """Start pretrain.py with a training of 400 epochs under torchrun, which gets these flags."""
    output = open(out.with_suffix(".txt"), "a")
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *words, "pretrain.py",
                             "--data", data, "--out", out, *SHORT, "--epochs", "400"],
                            cwd=ROOT, stdout=output, stderr=output,
                            env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, **how)


def wait_for_step(out, step, *agents):
    """Wait until a step is in the log, while the agents of torchrun live."""
    while max(steps(out), default=0) < step:
        assert all(agent.poll() is None for agent in agents), out.with_suffix(".txt").read_text()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_goes_on_under_torchrun_and_on_two_nodes(manifest, tmp_path, monkeypatch):
    """A run of one process is stopped in mid-epoch, and torchrun continues it with two. Kill -9 to
    one of them: torchrun restarts both. From a terminal torchrun alone gets Ctrl-C. Then two agents
    with one process each continue, until one of the agents gets SIGTERM."""
    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return torch.tensor(0.0)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "top1", stop)
        assert run_here(pretrain, "--data", manifest, "--out", out, *SHORT,
                        "--epochs", 400) == REQUEUE
    first = state_of(out)["step"]
    assert state_of(out)["position"] == (0, 2 * first) and first < 5
    agent = torchrun(manifest, out, "--standalone", "--nproc_per_node=2", "--max-restarts=2")
    children = lambda: Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    wait_for_step(out, 10, agent)
    last = max(steps(out))
    os.kill(int(children()[-1]), signal.SIGKILL)
    wait_for_step(out, last + 1, agent)
    workers, before = children(), out.with_suffix(".txt").read_text()
    assert f"continuing {out / 'checkpoint.pt'} at step {first} of " in before
    assert "it ran on 1 process(es), so the weights will not be the same to the bit" in before
    agent.send_signal(signal.SIGINT)
    assert agent.wait(300) == 1 and not any(Path(f"/proc/{worker}").exists() for worker in workers)
    text = out.with_suffix(".txt").read_text()[len(before):]
    assert text.count("stopped by Ctrl-C, saved at step ") == 1
    assert text.count("Traceback") == 1 and "SignalException" in text       # torchrun's
    second = state_of(out)["step"]
    assert second > last and not (out / "requeue").exists()
    nodes = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=1",
             f"--rdzv_endpoint=localhost:{free_port()}"]
    cores = (sorted(os.sched_getaffinity(0)) * 2)[:2]       # a core for each node
    agents = [torchrun(manifest, out, *nodes, preexec_fn=partial(os.sched_setaffinity, 0, {core}))
              for core in cores]
    wait_for_step(out, second + 10, *agents)
    agents[0].terminate()       # torchrun passes it to its process, which tells the other one
    for agent in agents:
        agent.wait(300)
    text = out.with_suffix(".txt").read_text()
    assert f"continuing {out / 'checkpoint.pt'} at step {second} of " in text
    assert "stopped by a signal, saved at step " in text
    assert steps(out) == list(range(10, state_of(out)["step"] + 1, 10))     # none twice or lost


# ---- checkpoints and disks

@pytest.mark.slow
@pytest.mark.parametrize("name,dtype,chunk", [("bf16", "bfloat16", ["--chunk", 2]),
                                              ("fp16", "float16", [])])
def test_each_precision_trains(name, dtype, chunk, manifest, tmp_path):
    assert run_here(pretrain, "--data", manifest, "--out", tmp_path, *SMALL, "--epochs", 1,
                    "--frames", 2, "--precision", name, *chunk) == 0
    head, line = log_of(tmp_path)
    assert head["precision"] == dtype and 0 < line["loss"] < 20
    assert (line["skipped"] > 0) == (name == "fp16")        # the first scale is too great


@pytest.mark.slow
def test_kept_checkpoints_can_be_used(trained, tree, tmp_path):
    """They hold the weights of their epoch, and keeping them does not change the training."""
    flags = ["--data", tree, "--out", tmp_path, *SMALL, "--epochs", 10, "--keep-every"]
    assert run_here(pretrain, *flags, 4) == 0
    assert sorted(path.name for path in tmp_path.glob("checkpoint*")) == [
        "checkpoint-4.pt", "checkpoint-8.pt", "checkpoint.pt"]
    assert steps(tmp_path) == [8, 10, 16, 20]
    assert_same_state(trained[0], tmp_path)
    checkpoint = tmp_path / "checkpoint-8.pt"
    shutil.copy(checkpoint, tmp_path / "checkpoint.pt")     # and train on from there
    assert state_of(tmp_path)["step"] == 16
    assert run_here(pretrain, *flags, 3) == 0
    assert_same_state(trained[0], tmp_path)
    assert run_here(retrieval, "--checkpoint", checkpoint, "--clips", 1) == 0
    found = json.loads((tmp_path / "retrieval-8.json").read_text())
    assert found["checkpoint"] == str(checkpoint)


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run_here(pretrain, "--data", "x", "--out", tmp_path / "file" / "run") == 1
    assert capsys.readouterr().err == (
        f"error: cannot write {tmp_path / 'file/run/lock'} (Not a directory): make room or mend "
        "that, then give the same command again\n")


def test_a_folder_that_cannot_be_locked(tmp_path, monkeypatch, capsys):
    """As on some network disks. The run goes on."""
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run.fcntl, "lockf", refuse)
    train(tmp_path)
    assert ("lock cannot be locked (No locks available): see to it yourself that no other run has "
            "the same --out\n" in capsys.readouterr().err)


@pytest.mark.parametrize("full,cause", [("checkpoint.pt", "File too large"),
                                        ("log.jsonl", "No space left on device")])
def test_a_full_disk_leaves_the_last_checkpoint(full, cause, tmp_path, capsys):
    """From step 11 on there is no room for a checkpoint, or for the log. With room the run goes on.
    The old checkpoint is another file than the new one, so no crash can leave half of both. (capsys
    keeps what is printed in memory, where the limit on files does not count.)"""
    def fill(n, _):
        if n == 11 and full == "checkpoint.pt":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        elif n == 11:
            log.unlink()
            log.symlink_to("/dev/full")

    log, linked = tmp_path / "log.jsonl", tmp_path / "linked.pt"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError) as stop:
            train(tmp_path, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(stop.value) == (f"cannot write {tmp_path / full} ({cause}): make room or mend that, "
                               "then give the same command again")
    assert not list(tmp_path.rglob("*.part"))
    os.link(tmp_path / "checkpoint.pt", linked)
    log.unlink()
    train(tmp_path)
    assert state_of(tmp_path)["step"] == 20
    assert torch.load(linked, weights_only=True)["step"] == 10
