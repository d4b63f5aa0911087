"""support/run.py: runs that are killed, pre-empted, out of disk space, or diverge."""

import errno
import json
import math
import os
import resource
import shutil
import signal
import socket
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import SMALL, Job, free_port, log_of, run_here

import pretrain
import retrieval
from data import make_loader
from support import run
from support.processes import INTERRUPTED
from support.rows import Row, read_rows, write_rows
from support.run import REQUEUE, Run, clearly_more, fingerprint, lock_folder


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


class Numbers(torch.utils.data.Dataset):
    """Ten clips that are numbers."""

    clips_per_file, seed, failures = None, 0, []
    rows = [Row(f"{n}.mp4", "a", "train", 1.0, 1.0, True, "") for n in range(10)]

    def __len__(self):
        return 10

    def __getitem__(self, key):
        n = key[1]
        return torch.tensor([1.0 + n]), torch.tensor(0.0), (f"{n}.mp4", self.failures)


def train(out, during=None, scaling=False, save_every=0.0):
    """Train on Numbers for 20 steps, five an epoch. Each tenth is logged and saved.

    during(n, trainer) is called in step n, and may return another loss for the log.
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


@pytest.mark.parametrize("at,saved,save_every,scaling,later,logged", [
    (12, 12, 60, True, "", [None, 10, 20]),     # by a signal
    (7, 6, 1e-9, True, "", [None, 1, 2, 3, 4, 5, 6, 10, 20]),           # with slow steps
    (11, 10, 0, True, '{"step": 20}\n{"step": 3', [None, 10, 20]),      # lines that come again
    (11, 10, 0, False, None, [20])])            # a log that is deleted
def test_a_run_that_breaks_off(at, saved, save_every, scaling, later, logged, tmp_path):
    """It goes on from its checkpoint, also from bfloat16 (without a scaler) to float16."""
    def break_off(n, _):
        if n == at == saved:
            os.kill(os.getpid(), signal.SIGTERM)
        elif n == at:
            raise ZeroDivisionError

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, scaling=True)
    with pytest.raises((SystemExit, ZeroDivisionError)):
        train(cut, break_off, scaling, save_every)
    assert state_of(cut)["step"] == saved
    log = cut / "log.jsonl"
    if later is None:
        log.unlink()
    else:
        log.write_text(log.read_text() + later)
    train(cut, scaling=True)
    assert_same_state(whole, cut)
    assert [line.get("step") for line in log_of(cut)] == logged
    if scaling:
        assert state_of(whole)["scaler"] == state_of(cut)["scaler"]
    if later:
        assert events(cut) == events(whole)


def test_what_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    """A weight, although all losses are finite. Then the loss of step 7 of another process: the
    files of both are named, and not those of step 10."""
    def spoil(_, trainer):
        trainer.model.weight.data.fill_(torch.inf)
        return 1.0

    def with_another(own):
        if isinstance(own, dict):   # a summary of the steps 1 to 10
            return [own, own | {"losses": [1.0] * 6 + [float("nan")] + [1.0] * 3}]
        return [own, own]

    message = "weights that are not finite after step 10, learning rate 0.1: there is no check"
    with pytest.raises(FloatingPointError, match=message):
        train(tmp_path, spoil)
    batches = []
    monkeypatch.setattr(run, "gather", with_another)
    with pytest.raises(FloatingPointError) as stop:
        train(tmp_path, lambda n, trainer: batches.append(trainer.files[-1]))
    files = batches[6] * 2
    assert str(stop.value) == (
        f"loss nan at step 7, learning rate 0.07, batch {', '.join(files)}: there is no "
        "checkpoint yet; try a lower --lr and another --out, or look at these files")
    assert len(set(files)) == 2 and log_of(tmp_path)[-1]["files"] == files
    assert not (tmp_path / "checkpoint.pt").exists()


def test_network_disks(tmp_path, monkeypatch, capsys):
    """Without locks the run goes on. Nodes that do not share --out are refused."""
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run.fcntl, "lockf", refuse)
    train(tmp_path)
    assert ("lock cannot be locked (No locks available): see to it yourself that no other run "
            "has the same --out\n" in capsys.readouterr().err)
    monkeypatch.setattr(run, "gather", lambda own: [own, (0, 0, 0, own[3])])
    with pytest.raises(ValueError, match="the processes see different checkpoints or data: is "
                                         "--out .* on a file system that they share?"):
        train(tmp_path)


def test_the_log_has_means(tmp_path):
    """Over the ten steps of a line. Of the learning rates it has the last."""
    train(tmp_path, lambda n, _: float(n))
    found = [(line["step"], line["loss"], line["top1"], line["lr"])
             for line in log_of(tmp_path)[1:]]
    assert found == [(10, 5.5, 2.75, 0.1), (20, 15.5, 7.75, 0.2)]


def test_too_many_failures_save_first(tmp_path, monkeypatch, capsys):
    """Half of the clips drawn fail. The count begins anew with each start."""
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
    """More than `last`: a probability below 1 %, if clips fail as often as allowed."""
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
    """The other processes of its group: loading processes, and their server."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):     # it has ended
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            if int(group) == pid != int(path.parent.name) and state != "Z":
                found.append(int(path.parent.name))
    return found


def left_of(pid):
    """Those that are still there after half a minute."""
    deadline = time.monotonic() + 30
    while helpers_of(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return helpers_of(pid)


def flags_of(brief, out, *more):
    """The flags of a run on the tree's ten training films. It saves at each line of the log."""
    return ["--data", brief.with_name("manifest.csv"), "--out", out, *SMALL,
            "--batch-per-process", 2, "--save-every", 0, *more]


@pytest.mark.slow
def test_killed_runs_end_with_the_same_weights(brief, tmp_path):
    """Kill -9 takes a loading process, as a lack of memory does, then twice the run itself. The
    lock that stays is no hindrance."""
    def start(out, core, method=None):
        flags = flags_of(brief, out, "--epochs", 10)
        return Job("pretrain.py", *flags, method=method, core=core)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    core, other = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    undisturbed = start(whole, other)   # at the same time
    for least, method, status in ((10, "fork", 1), (20, "fork", -9), (30, "forkserver", -9)):
        job = start(cut, core, method)
        job.wait_for(lambda: max(steps(cut), default=0) >= least
                     and (cut / "checkpoint.pt").exists())
        helpers = helpers_of(job.pid)
        assert helpers
        for number in helpers if status == 1 else [job.pid]:
            os.kill(number, signal.SIGKILL)
        assert job.wait() == status and left_of(job.pid) == []
        errors = job.printed()[1]
        assert "Traceback" not in errors
        assert (": a loading process ran out of memory, or" in errors) == (status == 1)
    job = start(cut, core)
    assert job.wait() == undisturbed.wait() == 0, job.printed()
    assert "continuing " in job.printed()[0]
    assert_same_state(whole, cut)
    assert events(whole) == events(cut) and steps(cut) == [10, 20, 30, 40, 50]


@pytest.mark.slow
def test_a_signal_to_the_group_saves(brief, tmp_path, capsys):
    """The loading processes and their server, which get it first, do not mind. No other run has
    the --out of one that lives. A mark stays until the next start."""
    outs = [tmp_path / method for method in ("forkserver", "spawn", "fork")]
    cores = sorted(os.sched_getaffinity(0)) * 3
    jobs = [Job("pretrain.py", *flags_of(brief, out, "--epochs", 400, "--save-every", 60),
                method=out.name, core=core) for out, core in zip(outs, cores)]
    signals = [(signal.SIGTERM, REQUEUE, "a signal"), (signal.SIGUSR1, REQUEUE, "a signal"),
               (signal.SIGINT, INTERRUPTED, "Ctrl-C")]
    for (number, status, cause), out, job in zip(signals, outs, jobs):
        again = flags_of(brief, out)    # with other --epochs
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
        assert "Traceback" not in errors and errors.count("\nsaving after this step") == 1
        assert errors.count("(Ctrl-C again ends at once, at the last") == (cause == "Ctrl-C")
        assert (out / "requeue").exists() == (status == REQUEUE)
        step = state_of(out)["step"]
        assert (f"stopped by {cause}, saved at step {step} of 2000: the same command continues "
                "from that step\n" in text)
        assert run_here(pretrain, *again) == 1 and not (out / "requeue").exists()


@pytest.mark.slow
@pytest.mark.parametrize("at,signals,sentence", [
    ("training", 2, "ended by a signal after Ctrl-C: the same command continues from the last "
     "checkpoint, if there is one\n"),
    ("scanning", 1, "stopped by Ctrl-C; the same command goes on from what is saved\n")])
def test_ctrl_c_ends_work_that_hangs_with_one_line(at, signals, sentence, brief, tmp_path):
    """A named pipe never gives a byte. Training waits for the end of its step, to save, until a
    second Ctrl-C comes."""
    (tmp_path / "films").mkdir()
    pipe = tmp_path / "films" / "a.mp4"
    os.mkfifo(pipe)
    rows = read_rows(brief.with_name("manifest.csv"))
    write_rows([row | {"path": str(pipe)} for row in rows], tmp_path / "m.csv")
    data = tmp_path / ("m.csv" if at == "training" else "films")
    job = Job("pretrain.py", "--data", data, "--out", tmp_path / "out", *SMALL)
    job.wait_for(lambda: at in "".join(job.printed()))
    for _ in range(signals):
        time.sleep(2)
        os.killpg(job.pid, signal.SIGINT)
    assert job.wait() == INTERRUPTED, job.printed()
    errors = job.printed()[1]
    assert errors.count(sentence) == 1 and "Traceback" not in errors
    assert left_of(job.pid) == []


@pytest.mark.slow
def test_a_run_goes_on_under_torchrun_and_on_two_nodes(brief, tmp_path, monkeypatch):
    """torchrun continues a run of one process with two, in mid-epoch, and restarts both after
    kill -9 to one. It alone gets Ctrl-C, as from a terminal. Then two agents with a process each
    continue, until one gets SIGTERM."""
    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return torch.tensor(0.0)

    out = tmp_path / "out"
    flags = flags_of(brief, out, "--epochs", 400)
    monkeypatch.setattr(pretrain, "top1", stop)
    assert run_here(pretrain, *flags) == REQUEUE
    first = state_of(out)["step"]
    assert state_of(out)["position"] == (0, 2 * first) and first < 5
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    agent = Job("torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2",
                "pretrain.py", *flags)
    children = lambda: Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    agent.wait_for(lambda: max(steps(out), default=0) >= 10)
    last = max(steps(out))
    os.kill(int(children()[-1]), signal.SIGKILL)
    agent.wait_for(lambda: max(steps(out)) > last)
    workers, (text, before) = children(), agent.printed()
    assert f"continuing {out / 'checkpoint.pt'} at step {first} of " in text
    assert "it ran on 1 process(es), so the weights will not be the same to the bit" in text
    assert "warning: the global batch was 2 and is 4, and with it" in before
    os.kill(agent.pid, signal.SIGINT)
    assert agent.wait() == 1
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    text, errors = agent.printed()
    assert text.count("stopped by Ctrl-C, saved at step ") == 1
    errors = errors[len(before):]
    assert errors.count("Traceback") == 1 and "SignalException" in errors   # torchrun's
    second = state_of(out)["step"]
    assert second > last and not (out / "requeue").exists()
    nodes = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=1",
             f"--rdzv_endpoint=localhost:{free_port()}"]
    agents = [Job("torch.distributed.run", *nodes, "pretrain.py", *flags, core=core)
              for core in (sorted(os.sched_getaffinity(0)) * 2)[:2]]
    for agent in agents:
        agent.wait_for(lambda: max(steps(out)) >= second + 10)
    os.kill(agents[0].pid, signal.SIGTERM)      # torchrun passes it on: both processes save
    for agent in agents:
        agent.wait()
    text = "".join(agent.printed()[0] for agent in agents)
    assert f"continuing {out / 'checkpoint.pt'} at step {second} of " in text
    assert "stopped by a signal, saved at step " in text
    assert steps(out) == list(range(10, state_of(out)["step"] + 1, 10))


@pytest.mark.slow
@pytest.mark.parametrize("name,dtype,chunk,moves", [
    ("bf16", "bfloat16", ["--chunk", 2], 4), ("fp16", "float16", [], 2)])
def test_each_precision_trains(name, dtype, chunk, moves, brief, tmp_path, capsys):
    """Two steps, in which the statistics of BatchNorm move once a chunk."""
    flags = flags_of(brief, tmp_path, "--batch-per-process", 4, "--epochs", 1, "--frames", 2)
    assert run_here(pretrain, *flags, "--precision", name, *chunk) == 0
    head, line = log_of(tmp_path)
    assert head["precision"] == dtype and 0 < line["loss"] < 20
    assert (line["skipped"] > 0) == (name == "fp16")    # the first scale is too great
    assert state_of(tmp_path)["model"]["f.stem.1.num_batches_tracked"] == moves
    said = "process(es) x 4 clips in chunks of 2, 2 view(s): 6 negatives per query"
    assert (said in capsys.readouterr().out) == bool(chunk)


@pytest.mark.slow
def test_kept_checkpoints_can_be_used(trained, tree, tmp_path):
    """Keeping them does not change the training."""
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


@pytest.mark.parametrize("full,limit", [("checkpoint.pt", 1000), ("log.jsonl", 100)])
def test_a_full_disk_leaves_the_last_checkpoint(full, limit, tmp_path, capsys):
    """There is no room from step 11 on. The new checkpoint is another file than the old one, so no
    crash leaves half of both. (What capsys keeps has no limit.)"""
    def fill(n, _):
        if n == 11:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError) as stop:
            train(tmp_path, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(stop.value) == (f"cannot write {tmp_path / full} (File too large): make room or "
                               "mend that, then give the same command again")
    assert not list(tmp_path.rglob("*.part"))
    os.link(tmp_path / "checkpoint.pt", tmp_path / "linked.pt")
    train(tmp_path)
    assert state_of(tmp_path)["step"] == 20 and steps(tmp_path) == [10, 20]
    assert torch.load(tmp_path / "linked.pt", weights_only=True)["step"] == 10
