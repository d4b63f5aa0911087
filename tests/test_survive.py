"""Real runs with real signals: killed, pre-empted, on two nodes, with a full disk, with a loss that is not finite."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from conftest import ROOT
from test_pretrain import SMALL, here, log_of

import pretrain
from data import Row, make_loader
from experiments import survive


def test_killed_runs_end_with_the_same_weights(tree, tmp_path):
    equal, alive, _ = survive.kills(tmp_path, ["--data", tree, "--epochs", 10, "--batch-size", 4], number=1)
    assert equal and alive == 1


class Numbers(torch.utils.data.Dataset):
    """Ten clips that are numbers, for a network that draws some of its own."""

    clips, seed, rows = None, 0, []

    def __len__(self):
        return 10

    def __getitem__(self, key):
        return torch.tensor([1.0 + key[1]]), torch.tensor(0.0), []


def test_random_draws_go_on_where_they_were(tmp_path):
    """A network with dropout, interrupted at step 12 of 20 and continued by a process that has drawn other numbers."""
    args = Namespace(epochs=4, save_every=0.0, max_failures=0.05, out=str(tmp_path))

    def train(path, breaks_at=None):
        torch.manual_seed(1)
        model, drawn = torch.nn.Linear(1, 50), []
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), torch.amp.GradScaler("cpu", enabled=False)
        if path.exists():
            torch.rand(1000)

        def forward(x, _):
            drawn.append(x)
            if len(drawn) == breaks_at:
                raise KeyboardInterrupt
            return torch.nn.functional.dropout(model(x), 0.5).square().mean(), lambda: torch.tensor(0.0)

        pretrain.fit(path, args, {}, make_loader(Numbers(), 2), model, optimizer, scaler, lambda epoch: [0.01], forward, 0, 1)
        return model.weight

    (tmp_path / "cut").mkdir()
    whole, cut = train(tmp_path / "whole.pt"), tmp_path / "cut" / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        train(cut, breaks_at=13)
    while not cut.exists() or torch.load(cut, weights_only=True)["at"] != (2, 4, 12):     # the writing thread goes on
        time.sleep(0.01)
    assert train(cut).equal(whole)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The loss is finite, its gradient at zero is not: the run stops, and no checkpoint holds what came of it."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    args = Namespace(epochs=4, save_every=0.0, max_failures=0.05, out=str(tmp_path))
    with pytest.raises(FloatingPointError, match="weights that are not finite after step 1, learning rate 0.01: there is no checkpoint"):
        pretrain.fit(tmp_path / "checkpoint.pt", args, {}, make_loader(Numbers(), 2), model,
                     torch.optim.SGD(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu", enabled=False),
                     lambda epoch: [0.01], lambda x, _: (model(x).abs().sqrt().mean(), lambda: torch.tensor(0.0)), 0, 1)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_signature_tells_data_sets_apart():
    def of(*names_and_labels):
        clips = Numbers()
        clips.rows = [Row(path, label, "train", 1.0, 1.0, True, "") for path, label in names_and_labels]
        return pretrain.signature(clips)

    one = of(("/here/a.mp4", "bell"), ("/here/b.mp4", "drum"))
    assert one == of(("/there/a.mp4", "bell"), ("/there/b.mp4", "drum"))      # moved
    assert len({one, of(("/here/a.mp4", "drum"), ("/here/b.mp4", "drum")), of(("/here/c.mp4", "bell"), ("/here/b.mp4", "drum"))}) == 3


def test_restarts_without_a_store_of_their_own_are_warned_of(monkeypatch, capsys):
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_: None)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_MAX_RESTARTS": "3"}.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    for present in (False, True):
        if present:
            monkeypatch.setenv(pretrain.UNSHARED, "1")
        pretrain.setup()
        assert ("needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err) != present
    torch.set_num_threads(threads)


def test_a_run_goes_on_in_another_precision(tmp_path):
    """From bfloat16, without a scaler, to float16 with one."""
    model, args = torch.nn.Linear(2, 2), Namespace(seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    none, one = (torch.amp.GradScaler("cpu", enabled=enabled) for enabled in (False, True))
    for there, here_ in ((none, one), (one, none), (one, one)):
        with ThreadPoolExecutor(1) as writer:
            pretrain.save(writer, tmp_path / "c.pt", args, "x", (1, 2, 3), [], model, optimizer, there)
        at, kept = pretrain.resume(tmp_path / "c.pt", args, "x", model, optimizer, here_)
        assert (at, kept) == ((1, 2, 3), [])


def test_same_sees_every_difference():
    x = {"a": [torch.ones(2), (1, 2)]}
    assert survive.same(x, {"a": [torch.ones(2), (1, 2)]})
    for other in ({"a": [torch.ones(2), (1, 3)]}, {"a": [torch.ones(2) + 1e-7, (1, 2)]}, {"b": x["a"]}, {"a": [torch.ones(2)]}):
        assert not survive.same(x, other)


def test_logs_are_compared_but_for_the_clock(tmp_path):
    for name, loss, rate in (("one", 2.5, 40.0), ("slower", 2.5, 30.0), ("other", 2.6, 40.0)):
        (tmp_path / name).mkdir()
        lines = [{"args": {"out": name}}, {"step": 10, "loss": loss, "clips_per_s": rate, "wait": rate / 100}]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    one, slower, other = (survive.events(tmp_path / name) for name in ("one", "slower", "other"))
    assert one == slower != other and one[0]["step"] == 10


def test_a_lost_worker_is_replaced(tree, tmp_path):
    assert survive.worker(tmp_path, ["--data", tree, "--epochs", 12, "--batch-size", 2]) < 60
    assert survive.steps(tmp_path / "two") == [10, 20, 24]


def test_signal_saves_and_two_nodes_go_on(tree, tmp_path):
    """SIGTERM to the whole process group, loading processes too; then two agents with one process each go on."""
    out, flags = tmp_path / "out", ["--data", tree, "--epochs", 100, "--batch-size", 2, "--save-every", 60]
    with open(tmp_path / "out.txt", "w") as text:
        run = subprocess.Popen([sys.executable, "pretrain.py", "--out", str(out), *survive.SHORT, *map(str, flags)], cwd=ROOT,
                               stdout=text, stderr=text, start_new_session=True)
        while not survive.steps(out):
            assert run.poll() is None
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGTERM)
        assert run.wait(60) == 75
    assert "stopped by a signal, saved at step " in (tmp_path / "out.txt").read_text()
    epoch, start, step = torch.load(out / "checkpoint.pt", weights_only=True)["at"]
    assert (step, start) == (5 * epoch + start // 2, start) and step >= 10

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cores = (sorted(os.sched_getaffinity(0)) * 2)[:2]     # a core for each node
    agents = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                                "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=1", "pretrain.py",
                                "--out", str(out), *survive.SHORT, *map(str, flags)], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True,
                               preexec_fn=partial(os.sched_setaffinity, 0, {core})) for core in cores]
    last = (step // 10 + 1) * 10
    while last not in survive.steps(out):
        assert all(agent.poll() is None for agent in agents), [agent.communicate()[0] for agent in agents]
        time.sleep(0.05)
    agents[0].terminate()                                 # torchrun hands it on to its worker, who tells the other's
    text = "".join(agent.communicate(timeout=60)[0] for agent in agents)
    assert f"continuing {out / 'checkpoint.pt'} at step {step} of " in text and "1 process(es) there, 2 here" in text
    assert "stopped by a signal, saved at step " in text
    at = torch.load(out / "checkpoint.pt", weights_only=True)["at"]
    assert at[2] >= last and survive.steps(out) == list(range(10, at[2] + 1, 10))     # no line twice, none lost


def test_loss_that_is_not_finite_stops_all(tree, tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "pretrain.py",
                           "--data", str(tree), "--out", str(tmp_path), *SMALL, "--batch-size", "2", "--lr", "1e30",
                           "--epochs", "8"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    sentences = [line for line in done.stderr.splitlines() if line.startswith("error") and "loss nan at step " in line]
    assert sentences and all(".mp4" in line and "learning rate " in line and "there is no checkpoint yet" in line
                             for line in sentences), done.stderr[-3000:]
    last = log_of(tmp_path)[-1]
    assert len(last["files"]) == 4 and not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("name,dtype", [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_each_precision_trains(name, dtype, tree, tmp_path, monkeypatch, capsys):
    assert here(monkeypatch, "--data", tree, "--out", tmp_path, *SMALL, "--epochs", "2", "--precision", name) == 0
    head, line = log_of(tmp_path)
    assert head["precision"] == dtype and 0 < line["loss"] < 20
    assert (line["skipped"] > 0) == (name == "fp16")      # the first scale, 65536, is too much for float16


def test_full_disk_leaves_the_last_checkpoint(tree, tmp_path, monkeypatch, capsys):
    pretrain.write_whole(b"good", tmp_path / "a.pt")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))    # no file may grow past it, as on a full disk
    try:
        with pytest.raises(OSError, match=r"cannot write .*a.pt \(File too large\): make room, then the same command"):
            pretrain.write_whole(bytes(2_000_000), tmp_path / "a.pt")
        status = here(monkeypatch, "--data", tree, "--out", tmp_path / "run", *SMALL, "--save-every", "0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "a.pt").read_bytes() == b"good"
    os.link(tmp_path / "a.pt", tmp_path / "b.pt")
    pretrain.write_whole(b"better", tmp_path / "a.pt")    # another file takes its name: nothing is written into the old one
    assert (tmp_path / "a.pt").read_bytes() == b"better" and (tmp_path / "b.pt").read_bytes() == b"good"
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(errors) == 1 and "checkpoint.pt" in errors[0] and "make room" in errors[0]
    assert not list(tmp_path.rglob("*.part"))


def test_log_is_cut_where_the_checkpoint_ends(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in ({"args": 1}, {"step": 10}, {"step": 20})) + '{"step": 3')
    pretrain.shorten(log, 10)
    assert log.read_text() == '{"args": 1}\n{"step": 10}\n'


def test_damaged_checkpoint(tree, tmp_path, monkeypatch, capsys):
    torch.save({"args": {}}, tmp_path / "checkpoint.pt")
    for content, sentence in (((tmp_path / "checkpoint.pt").read_bytes(), "is no checkpoint.pt of this script: it lacks clips"),
                              (b"PK\x03\x04 cut off", "is cut off, or another program's, or carries code")):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        assert here(monkeypatch, "--data", tree, "--out", tmp_path, *SMALL) == 1
        assert sentence in capsys.readouterr().err and (tmp_path / "checkpoint.pt").read_bytes() == content
