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
import tempfile
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
from data import Row, make_loader
from prepare import scan
from support import run
from support.processes import INTERRUPTED
from support.run import REQUEUE, Run, clearly_more, fingerprint, lock_folder

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
    for name in ("model", "optimizer", "position", "step", "replaced", "skipped"):
        exact(first[name], second[name], msg=name)


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

    during(n, trainer) is called while step n is computed. scaling: with a gradient scaler.
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
        trainer.log(loss=loss, lr=0.01 * n)
        if during:
            during(n, trainer)


@pytest.mark.parametrize("number,status,cause,before", [
    (signal.SIGTERM, 75, "a signal", 1), (signal.SIGUSR1, 75, "a signal", 2),
    (signal.SIGINT, 130, "Ctrl-C", 1)])
def test_a_signal_saves_in_mid_epoch(number, status, cause, before, tmp_path, capsys):
    """The same command then ends with the weights of a run that nobody stops. It says if the number
    of processes was another one before."""
    def stop(n, _):
        if n == 12:
            os.kill(os.getpid(), number)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole)
    with pytest.raises(SystemExit) as stopped:
        train(cut, stop)
    assert stopped.value.code == status and (cut / "requeue").exists() == (status == REQUEUE)
    assert (f"stopped by {cause}, saved at step 13 of 20: the same command continues from that "
            "step\n" in capsys.readouterr().out)
    assert state_of(cut)["position"] == (2, 6)
    torch.save(state_of(cut) | {"world_size": before}, cut / "checkpoint.pt")
    train(cut)
    change = ("; it ran on 2 process(es) and now runs on 1, in global batches of 2, so the weights "
              "will not be the same to the bit" if before == 2 else "")
    assert (f"continuing {cut / 'checkpoint.pt'} at step 13 of 20{change}\n"
            in capsys.readouterr().out)
    assert_same_state(whole, cut)
    assert steps(cut) == [10, 20] and not (cut / "requeue").exists()


@pytest.mark.parametrize("later,before,after", [
    ('{"step": 20}\n{"step": 3', True, True), ("", True, False), (None, False, True)])
def test_a_run_that_breaks_off(later, before, after, tmp_path):
    """It goes on from the checkpoint of step 10, in another precision too: from float16 with a
    gradient scaler to bfloat16 without one and back. Lines of the log that follow the checkpoint
    come again. A log that was deleted is no hindrance."""
    def break_off(n, _):
        if n == 11:
            raise ZeroDivisionError

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, scaling=after)
    with pytest.raises(ZeroDivisionError):
        train(cut, break_off, before)
    log = cut / "log.jsonl"
    if later is None:
        log.unlink()
    else:
        log.write_text(log.read_text() + later)
    train(cut, scaling=after)
    assert_same_state(whole, cut)
    if before:
        assert state_of(whole)["scaler"] == state_of(cut)["scaler"]
    if later is None:
        assert json.loads(log.read_text())["step"] == 20
    else:
        assert events(cut) == events(whole) and steps(cut) == [10, 20]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """A gradient was infinite, and all losses are finite: the run stops and saves nothing of it."""
    def spoil(_, trainer):
        trainer.model.weight.data.fill_(torch.inf)
        trainer.log(loss=torch.tensor(1.0))

    message = "weights that are not finite after step 10, learning rate 0.1: there is no check"
    with pytest.raises(FloatingPointError, match=message):
        train(tmp_path, spoil)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_batch_whose_loss_is_not_finite_is_named(tmp_path, monkeypatch):
    """Step 7 has the bad loss, on the other one of two processes. The message and the log name the
    files of both, and not those of step 10."""
    def with_another(own):
        if isinstance(own, dict):               # what the processes report before a line of the log
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


def test_processes_that_see_different_checkpoints_stop(tmp_path, monkeypatch):
    """As on nodes whose --out is not shared: one has a checkpoint, the other has none."""
    train(tmp_path)
    monkeypatch.setattr(run, "gather", lambda own: [own, (0, 0, 0, own[3])])
    with pytest.raises(ValueError, match="the processes see different checkpoints or data: is "
                                         "--out .* on a file system that they share?"):
        train(tmp_path)


def test_the_log_has_means(tmp_path):
    """Loss and other tensors are means over the ten steps of a line, numbers those of the last."""
    train(tmp_path, lambda n, trainer: trainer.log(loss=torch.tensor(float(n)),
                                                   top1=torch.tensor(0.1 * n)))
    lines = log_of(tmp_path)[1:]
    assert [line["step"] for line in lines] == [10, 20]
    assert [line["loss"] for line in lines] == [5.5, 15.5]
    assert [line["top1"] for line in lines] == pytest.approx([0.55, 1.55])
    assert [line["lr"] for line in lines] == pytest.approx([0.1, 0.2])


def test_too_many_failures_save_first(tmp_path, monkeypatch, capsys):
    """Half of the clips fail. The count is that of clips drawn, and begins anew with each start."""
    monkeypatch.setattr(Numbers, "failures", ["bad.mp4: Invalid data"])
    for step in (10, 20):
        with pytest.raises(ValueError) as stop:
            train(tmp_path, save_every=60)
        assert str(stop.value) == (
            "20 of the 40 clips drawn since the start could not be read, clearly more than "
            "--max-failures 0.05 of them: see the causes above, check the disk and the manifest; "
            f"the checkpoint of step {step} is kept")
        assert capsys.readouterr().err.count("replaced: bad.mp4: Invalid data") == 20
        state = state_of(tmp_path)
        assert state["step"] == step and state["replaced"] == 2 * step


@pytest.mark.parametrize("limit,drawn,last", [(0.05, 8, 2), (0.05, 80, 10), (0.05, 1000, 70),
                                              (0.3, 25, 14), (0.0, 1000, 0)])
def test_a_run_stops_if_clearly_more_clips_fail_than_allowed(limit, drawn, last):
    """`last` is the most that may fail of those drawn. More has a probability of less than 1 % by
    the binomial distribution, if clips fail as often as allowed."""
    assert [clearly_more(failed, drawn, limit) for failed in range(drawn + 1)] == [
        failed > last for failed in range(drawn + 1)]
    likely = sum(math.comb(drawn, n) * limit ** n * (1 - limit) ** (drawn - n)
                 for n in range(last + 1))
    assert 1 - likely < 0.01


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


def left_of(pid):
    """The processes of its group that are still there after half a minute."""
    deadline = time.monotonic() + 30
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
def test_killed_runs_end_with_the_same_weights(manifest, tmp_path):
    """Kill -9 comes after checkpoints and within steps, once for each way to start the loading
    processes. The lock that each leaves is no hindrance. The run that nobody stops has another core
    at the same time."""
    whole, cut, flags = tmp_path / "whole", tmp_path / "cut", ("--epochs", 12)
    core, other = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    undisturbed = start(manifest, whole, *flags, core=other)
    for least, method in ((10, "fork"), (20, "forkserver"), (30, "spawn")):
        job = start(manifest, cut, *flags, method=method, core=core)
        job.wait_for(lambda: max(steps(cut), default=0) >= least
                     and (cut / "checkpoint.pt").exists())
        if method == "spawn":
            time.sleep(0.2)
        assert helpers_of(job.pid)
        os.kill(job.pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
        assert left_of(job.pid) == [], "a killed run leaves processes behind"
        assert ("continuing " in job.printed()[0]) == (least > 10)
    job = start(manifest, cut, *flags, core=core)
    assert job.wait() == undisturbed.wait() == 0, job.printed()
    assert_same_state(whole, cut)
    assert events(whole) == events(cut) and steps(cut) == list(range(10, 61, 10))


@pytest.mark.slow
def test_a_signal_to_the_group_saves(manifest, tmp_path, capsys):
    """The loading processes and the server that forks them get the signal first, and do not mind.
    While the run lives, no other run has its --out. A scheduler's signal, not Ctrl-C, leaves a mark
    that the next start removes."""
    flags, cores = ("--epochs", 400, "--save-every", 60), os.sched_getaffinity(0)
    jobs = [(number, status, tmp_path / method,
             start(manifest, tmp_path / method, *flags, method=method, core=core))
            for number, status, method, core in (
                (signal.SIGTERM, REQUEUE, "forkserver", min(cores)),
                (signal.SIGUSR1, REQUEUE, "spawn", max(cores)),
                (signal.SIGINT, INTERRUPTED, "fork", min(cores)))]
    for number, status, out, job in jobs:
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
        cause = "Ctrl-C" if status == INTERRUPTED else "a signal"
        assert "Traceback" not in errors and (out / "requeue").exists() == (status == REQUEUE)
        assert f"stopped by {cause}, saved at step {state_of(out)['step']} of " in text
        assert run_here(pretrain, *again) == 1              # other --epochs
        assert "epochs was 400 and is 4" in capsys.readouterr().err
        assert not (out / "requeue").exists()


@pytest.mark.slow
@pytest.mark.parametrize("at", ["training", "scanning", "evaluating"])
def test_ctrl_c_ends_work_that_hangs_with_one_line(at, tree, brief, tmp_path):
    """Files that never give a byte, named pipes, hold up the work. Training waits for the end of
    its step, to save, until a second Ctrl-C comes."""
    (tmp_path / "films").mkdir()
    rows = scan.scan(tree)
    for n, row in enumerate(rows):
        row["path"] = str(tmp_path / "films" / f"{n}.mp4")
        os.mkfifo(row["path"])
    scan.write(rows, tmp_path / "m.csv")
    script, *args = {
        "training": ["pretrain.py", "--data", tmp_path / "m.csv", "--out", tmp_path / "out"],
        "scanning": ["pretrain.py", "--data", tmp_path / "films", "--out", tmp_path / "out"],
        "evaluating": ["retrieval.py", "--data", tmp_path / "m.csv", "--checkpoint", brief]}[at]
    job = Job(script, *args, *(SMALL if script == "pretrain.py" else []))
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
    assert "it ran on 1 process(es) and now runs on 2" in before
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
@pytest.mark.parametrize("name,dtype,chunk", [
    ("bf16", "bfloat16", ["--chunk", 2]), ("fp16", "float16", []),
    ("fp16", "float16", ["--chunk", 2])])
def test_each_precision_trains(name, dtype, chunk, manifest, tmp_path):
    assert run_here(pretrain, "--data", manifest, "--out", tmp_path, *SMALL, "--epochs", 1,
                    "--frames", 2, "--precision", name, *chunk) == 0
    head, line = log_of(tmp_path)
    assert head["precision"] == dtype and 0 < line["loss"] < 20
    assert (line["skipped"] > 0) == (name == "fp16")        # the first scale is too great


@pytest.mark.slow
def test_kept_checkpoints_can_be_used(trained, tree, tmp_path):
    """They hold the weights of their epoch, and keeping them does not change the training."""
    plain, kept = trained[0], tmp_path / "kept"
    flags = ["--data", tree, "--out", kept, *SMALL, "--epochs", 10, "--keep-every"]
    assert run_here(pretrain, *flags, 4) == 0
    assert sorted(path.name for path in kept.glob("checkpoint*")) == [
        "checkpoint-4.pt", "checkpoint-8.pt", "checkpoint.pt"]
    assert steps(kept) == [8, 10, 16, 20]
    assert_same_state(plain, kept)
    shutil.copy(kept / "checkpoint-8.pt", kept / "checkpoint.pt")       # and train on from there
    assert state_of(kept)["step"] == 16
    assert run_here(pretrain, *flags, 3) == 0
    assert_same_state(plain, kept)
    checkpoint = kept / "checkpoint-9.pt"
    assert run_here(retrieval, "--checkpoint", checkpoint, "--clips", 1) == 0
    assert json.loads((kept / "retrieval-9.json").read_text())["checkpoint"] == str(checkpoint)


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


def test_a_folder_that_cannot_be_locked(tmp_path, monkeypatch, capsys):
    """As on some network disks. The run goes on."""
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run.fcntl, "lockf", refuse)
    train(tmp_path)
    assert ("lock cannot be locked (No locks available): see to it yourself that no other run has "
            "the same --out\n" in capsys.readouterr().err)


@pytest.mark.parametrize("step,full,sentence", [
    (1, "checkpoint.pt", "make room, then give the same command again; there is no checkpoint yet"),
    (11, "checkpoint.pt", "make room, then give the same command again; the checkpoint of step 10 "
     "is kept"),
    (11, "log.jsonl", "make room, then the same command continues; the checkpoint of step 10 is "
     "kept")])
def test_a_full_disk_leaves_the_last_checkpoint(step, full, sentence, tmp_path, capsys):
    """From a step on there is no room for a checkpoint, or for the log. With room the run goes on.
    The old checkpoint is another file than the new one, so no crash can leave half of both. (capsys
    keeps what is printed in memory, where the limit on files does not count.)"""
    def fill(n, _):
        if n == step and full == "checkpoint.pt":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        elif n == step:
            log.unlink()
            log.symlink_to("/dev/full")

    log, linked = tmp_path / "log.jsonl", tmp_path / "linked.pt"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError) as stop:
            train(tmp_path, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    cause = "File too large" if full == "checkpoint.pt" else "No space left on device"
    assert str(stop.value) == f"cannot write {tmp_path / full} ({cause}): {sentence}"
    assert not list(tmp_path.rglob("*.part"))
    assert (tmp_path / "checkpoint.pt").exists() == (step > 1)
    if step > 1:
        os.link(tmp_path / "checkpoint.pt", linked)
    log.unlink()
    train(tmp_path)
    assert state_of(tmp_path)["step"] == 20
    assert step == 1 or torch.load(linked, weights_only=True)["step"] == 10


def test_foreign_checkpoints_are_left_as_they_are(tmp_path):
    torch.save({"settings": {}}, tmp_path / "checkpoint.pt")
    content = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="no checkpoint.pt of this project: it lacks"):
        train(tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == content
