"""support/processes.py: several processes, hosts and schedulers, as a cluster has them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, finish, log_of, run, start_workers

from support import processes
from support.run import REQUEUE

# A run of a few seconds per process, whose batches do not depend on the number of processes.
TINY = ["--arch", "r2plus1d_10", "--size", "16", "--frames", "4", "--fps", "4", "--warmup", "1",
        "--workers", "0", "--precision", "fp32"]


def write_script(path, body):
    """Write a script that finds the project, and return its path."""
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(body))
    return path


# ---- hosts whose own name is a loopback address

@pytest.mark.parametrize("names,found,expected,warns", [
    ({"me": "127.0.1.1", "node0": "10.0.0.1"}, {"eth0": "10.0.0.2", "ib0": "10.9.0.2"}, "eth0", 0),
    ({"me": "10.0.0.2", "node0": "10.0.0.1"}, {"eth0": "10.0.0.2"}, None, 0),
    ({"me": "127.0.1.1", "node0": "127.0.1.1"}, {"eth0": "10.0.0.2"}, "eth0", 0),
    ({"node0": "10.0.0.1"}, {"eth0": "10.0.0.2"}, "eth0", 0),           # it does not know its name
    ({"me": "127.0.1.1", "node0": "127.0.1.1"}, {"eth0": "10.0.0.2", "ib0": "10.9.0.2"}, None, 1)])
def test_the_interface_of_the_route_is_taken(names, found, expected, warns, monkeypatch, capsys):
    """me is this host, and its route to node0 leaves from 10.0.0.2."""
    def address(host):
        if host not in names:
            raise OSError("unknown host")
        return names[host]

    class Probe(processes.socket.socket):
        def connect(self, host):
            assert host[0] == "node0"

        def getsockname(self):
            return "10.0.0.2", 9

    monkeypatch.setattr(processes.socket, "gethostname", lambda: "me")
    monkeypatch.setattr(processes.socket, "gethostbyname", address)
    monkeypatch.setattr(processes.socket, "socket", Probe)
    monkeypatch.setattr(processes, "interfaces", lambda: found)
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    processes.choose_interface()
    assert os.environ.pop("GLOO_SOCKET_IFNAME", None) == expected
    warning = "set GLOO_SOCKET_IFNAME to the interface that leads to them, one of eth0, ib0"
    assert (warning in capsys.readouterr().err) == bool(warns)
    for name, value in (("GROUP_WORLD_SIZE", "1"), ("GLOO_SOCKET_IFNAME", "mine")):
        monkeypatch.setenv(name, value)         # one node, or the user's choice: nothing is changed
        processes.choose_interface()
        assert os.environ.get("GLOO_SOCKET_IFNAME") == (value if value == "mine" else None)


def test_interfaces_have_addresses():
    found = processes.interfaces()
    assert "lo" not in found
    assert all(re.fullmatch(r"\d+\.\d+\.\d+\.\d+", address) for address in found.values())


@pytest.fixture
def two_hosts():
    """The names of two network namespaces, joined by a cable: 10.77.0.1 and 10.77.0.2."""
    def ip(*words, check=True):
        return subprocess.run(["ip", *words], check=check, capture_output=True).returncode

    names = [f"host{os.getpid()}a", f"host{os.getpid()}b"]
    tools = shutil.which("ip") and shutil.which("unshare")
    if os.geteuid() or not tools or ip("netns", "add", names[0], check=False):
        pytest.skip("this user cannot make network namespaces")
    ip("netns", "add", names[1])
    ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "eth0", "netns", names[1])
    for n, name in enumerate(names, 1):
        ip("-n", name, "address", "add", f"10.77.0.{n}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", name, "link", "set", device, "up")
    yield names
    for name in names:
        ip("netns", "delete", name)


@pytest.mark.slow
def test_two_hosts_that_call_themselves_localhost(two_hosts, tmp_path):
    script = write_script(tmp_path / "meet.py", """
        from support.processes import gather, rank, start
        start()
        print(gather(rank()), flush=True)
        """)
    hosts = [subprocess.Popen(
        ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c",
         f"hostname localhost && exec {sys.executable} {script}"], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"RANK": str(n), "WORLD_SIZE": "2", "MASTER_ADDR": "10.77.0.1",
                          "MASTER_PORT": "29511", "SLURM_NNODES": "2"})
        for n, name in enumerate(two_hosts)]
    try:
        texts = [host.communicate(timeout=90)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert all("[0, 1]" in text for text in texts), texts


# ---- GPUs (none is needed: what torch says of them is made up)

class Gpus:
    """torch.cuda of a process that sees GPUs with these UUIDs."""

    def __init__(self, monkeypatch, visible, local_rank):
        self.visible, self.chosen = visible, None
        for name, value in (("is_available", lambda: True), ("device_count", lambda: len(visible)),
                            ("set_device", self.choose),
                            ("get_device_properties", lambda x: Namespace(uuid=visible[x.index]))):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))

    def choose(self, device):
        self.chosen = device.index


@pytest.mark.parametrize("visible,local_rank,index", [
    (["a", "b", "c", "d"], 3, 3), (["d"], 3, 0), (["a"], 0, 0)])
def test_a_process_takes_a_gpu_that_it_sees(visible, local_rank, index, monkeypatch):
    """Four GPUs, or the process's own alone, as srun --gpus-per-task=1 shows it."""
    gpus = Gpus(monkeypatch, visible, local_rank)
    assert processes.start() == torch.device("cuda", index) and gpus.chosen == index


@pytest.mark.parametrize("uuids,sentence", [
    (["a", "b", "c"], None),
    (["a", "b", "a"], "processes 0, 2 would share one GPU: start as many")])
def test_processes_that_would_share_a_gpu_are_refused(uuids, sentence, monkeypatch):
    Gpus(monkeypatch, ["a"], 0)
    monkeypatch.setattr(processes, "gather", lambda own: uuids)
    if sentence is None:
        return processes.refuse_shared_gpus(torch.device("cuda", 0))
    with pytest.raises(ValueError, match=sentence):
        processes.refuse_shared_gpus(torch.device("cuda", 0))


@pytest.mark.parametrize("capability,refused", [((7, 0), True), ((7, 5), False), ((12, 0), False)])
def test_a_gpu_without_kernels_is_refused(capability, refused, monkeypatch):
    """The architectures are those of the default wheel of torch 2.14."""
    for name, value in (("get_device_capability", capability), ("get_device_name", "Tesla V100"),
                        ("get_arch_list", ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120",
                                           "compute_120"])):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    if not refused:
        return processes.refuse_old_gpu("cuda:0")
    with pytest.raises(ValueError, match="no kernels for Tesla V100 .compute capability 7.0."):
        processes.refuse_old_gpu("cuda:0")


def test_a_full_gpu_gets_one_sentence(capsys):
    def job(args, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    with pytest.raises(SystemExit):
        processes.launch(job, None)
    assert capsys.readouterr().err == ("error: CUDA out of memory: give fewer clips per process or "
                                       "a smaller --size\n")


# ---- BatchNorm

@pytest.mark.slow
def test_batchnorm_of_two_processes_is_that_of_one(tmp_path):
    """Outputs, gradients and running statistics of two steps, in float64, beside nn.BatchNorm3d.
    The inputs are far from zero, where a careless variance loses its digits."""
    script = write_script(tmp_path / "norm.py", """
        import torch, torch.distributed as dist
        from torch import nn
        from support.layers import trainable
        from support.processes import rank, start

        start()
        torch.manual_seed(0)
        one = nn.Sequential(nn.BatchNorm3d(3), nn.Tanh()).double()
        nn.init.normal_(one[0].weight), nn.init.normal_(one[0].bias)
        two = nn.Sequential(nn.BatchNorm3d(3), nn.Tanh()).double()
        two.load_state_dict(one.state_dict())
        two = trainable(two, torch.device("cpu")).double()
        two.load_state_dict(one.state_dict())
        own = slice(4 * rank(), 4 * rank() + 4)
        for _ in range(2):
            x = (1000 + torch.randn(8, 3, 2, 5, 5).double()).requires_grad_()
            part, target = x.detach()[own].requires_grad_(), torch.randn(8, 3, 2, 5, 5).double()
            ((one(x) - target) ** 2).sum().backward()
            ((two(part) - target[own]) ** 2).sum().backward()
            torch.testing.assert_close(part.grad, x.grad[own], atol=1e-9, rtol=1e-7)
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            dist.all_reduce(b.grad)
            torch.testing.assert_close(b.grad, a.grad, atol=1e-9, rtol=1e-7)
        for name, b in two.state_dict().items():
            torch.testing.assert_close(b, one.state_dict()[name], atol=1e-9, rtol=1e-7, msg=name)
        print("equal", flush=True)
        """)
    done = run(script=script, processes=2)
    assert done.stdout.split() == ["equal", "equal"]


# ---- the end

@pytest.mark.slow
def test_processes_leave_together(tmp_path):
    """Process 1 still works when process 0 has done its part, as a slow disk would have it."""
    script = write_script(tmp_path / "leave.py", """
        import os, time
        import torch.distributed as dist
        from support import processes

        def job(args, device):
            destroy = dist.destroy_process_group
            dist.destroy_process_group = lambda: (print("left", flush=True), destroy())
            time.sleep(2 * processes.rank())
            print("done", flush=True)

        processes.launch(job, None)
        """)
    done = run(script=script, processes=2)
    assert done.stdout.split() == ["done", "done", "left", "left"]


# ---- patience

@pytest.mark.slow
def test_the_others_wait_for_a_process_with_a_slow_disk(tmp_path):
    """Here the group gives up after 2 s, in place of nccl's 10 minutes, and one disk takes 5 s."""
    script = write_script(tmp_path / "slow.py", """
        import time
        from datetime import timedelta
        import torch, torch.distributed as dist
        from data import make_loader
        from support.batches import evaluation_batches
        from support.processes import run_once, start

        class Clips(torch.utils.data.Dataset):
            clips_per_file = 1
            def __len__(self):
                return 4
            def __getitem__(self, n):
                time.sleep(2.5 * (n % 2))            # process 1 reads the clips 1 and 3
                return torch.ones(1), n, (n, None)

        dist.init_process_group("gloo", timeout=timedelta(seconds=2))
        start()
        found = torch.zeros(4)
        for _, _, index in evaluation_batches(make_loader(Clips(), 1, 0), 0):
            found[index] = 1
        dist.all_reduce(found)
        run_once(lambda: time.sleep(4))
        print(found.tolist(), flush=True)
        """)
    done = run(script=script, processes=2)
    assert done.stdout.count("[1.0, 1.0, 1.0, 1.0]") == 2, done.stderr[-3000:]


# ---- Slurm

SRUN = f"""#!{sys.executable}
# In place of srun --kill-on-bad-exit=1: two tasks. The first that fails takes the other with it.
# Task 1 takes 5 s longer to exit, as if it had a GPU to give back.
import os, signal, subprocess, sys, time
command = sys.argv[sys.argv.index("bash"):]
tasks = [subprocess.Popen(command, start_new_session=True, env=os.environ | {{
    "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n), "SLURM_NTASKS": "2",
    "PYTHONPATH": "slow_exit" if n else ""}}) for n in range(2)]
signal.signal(signal.SIGUSR1, lambda *_: [os.killpg(task.pid, signal.SIGUSR1) for task in tasks])
while all(task.poll() is None for task in tasks):
    time.sleep(0.001)
if any(task.poll() for task in tasks):
    for task in tasks:
        if task.poll() is None:
            os.killpg(task.pid, signal.SIGKILL)
states = [task.wait() for task in tasks]
sys.exit(max(128 - state if state < 0 else state for state in states))
"""
SCONTROL = """#!/bin/sh
case $1 in
show) echo localhost;;
requeue) echo $2 >> requeued;;
esac
"""


@pytest.mark.slow
def test_the_slurm_script_continues_itself(tree, tmp_path):
    """The script of docs/running.md, with stand-ins for srun and scontrol. The first process to
    exit has srun kill the other one, so that the status is not the one of a saved run."""
    script = re.search(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```",
                       (ROOT / "docs/running.md").read_text(), re.DOTALL)[1]
    out, flags = tmp_path / "out", [*TINY, "--batch-per-process", "2"]
    script = script.replace("runs/k400", str(out)).replace(
        "--data k400.csv", f"--data {tree} {' '.join(flags)} --epochs $EPOCHS")
    script = script.replace("python pretrain.py", f"{sys.executable} {ROOT / 'pretrain.py'}")
    (tmp_path / "job.sh").write_text(script)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "slow_exit").mkdir()
    (tmp_path / "slow_exit" / "sitecustomize.py").write_text(
        "import atexit, time\natexit.register(time.sleep, 5)\n")
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "EPOCHS": "9",
        "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "LOCAL_WORLD_SIZE": "2"}
    job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environment,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text().split("\n")) < 3:
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    srun, = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(srun), signal.SIGUSR1)
    text = job.communicate(timeout=60)[0]
    assert "saved at step " in text
    assert job.returncode > REQUEUE, text                   # one of the two was killed
    assert (tmp_path / "requeued").read_text() == "7\n"
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    (tmp_path / "slow_exit" / "sitecustomize.py").unlink()
    again = subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=environment, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert f"at step {step} of 18" in again.stdout and again.returncode == 0
    assert (tmp_path / "requeued").read_text() == "7\n" and not (out / "requeue").exists()


# ---- eight processes

EIGHT = """
    import sys
    import models, pretrain, retrieval
    from torch import nn
    from support.processes import launch

    def tiny_video_encoder(arch):
        return nn.Sequential(nn.Conv3d(3, 8, 3, 2), nn.BatchNorm3d(8), nn.ReLU(),
                             nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 512))

    def tiny_audio_encoder():
        return nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(),
                             nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 512))

    def job():
        models.video_encoder, models.audio_encoder = tiny_video_encoder, tiny_audio_encoder
        if script == "pretrain":                # BatchNorm stays in evaluation mode
            nn.modules.batchnorm._BatchNorm.train = lambda net, _: nn.Module.train(net, False)
            launch(pretrain.train, pretrain.parse(flags))
        else:
            launch(retrieval.evaluate, retrieval.parse(flags))

    if __name__ == "__main__":
        script, *flags = sys.argv[1:]
        job()
    """


@pytest.mark.slow
def test_eight_processes(tree, tmp_path, monkeypatch):
    """Pre-training of two epochs loses a process, ends, and is continued; retrieval follows. The
    losses are those of one process with the same global batch. The encoders are tiny ones."""
    script = write_script(tmp_path / "eight.py", EIGHT)
    eight, one = tmp_path / "eight", tmp_path / "one"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    flags = ["--data", tree, "--split", "test", "--epochs", 2, *TINY, "--keep-every", 1]
    whole = [*flags, "--batch-per-process", 1, "--out", eight]
    workers, folder = start_workers(script, ["pretrain", *whole], 8)
    while not (eight / "checkpoint-1.pt").exists():
        assert all(worker.is_alive() for worker in workers), finish(workers, folder)
        time.sleep(0.02)
    workers[-1].kill()
    finish(workers, folder)                                 # the other seven do not hang
    assert [worker.exitcode for worker in workers] == [1] * 7 + [-signal.SIGKILL]
    again = run("pretrain", *whole, script=script, processes=8)
    assert "checkpoint.pt at step 3 of 6" in again.stdout
    run("pretrain", *flags, "--batch-per-process", 8, "--out", one, script=script, fresh=True)
    losses, expected = ([line["loss"] for line in log_of(out)[1:]] for out in (eight, one))
    assert losses == pytest.approx(expected, rel=1e-4) and len(losses) == 2
    run("retrieval", "--checkpoint", eight / "checkpoint.pt", "--clips", 1, script=script,
        processes=8)
    assert json.loads((eight / "retrieval.json").read_text())["pool"] == 24
