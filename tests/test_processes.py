"""support/processes.py: several processes, hosts and schedulers, as a cluster has them."""

import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, Job, run_two

from support import processes
from support.run import REQUEUE


def test_what_a_launcher_has_left_out(monkeypatch, capsys):
    """srun without ranks is refused, and torchrun without a store for each restart warned of."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ValueError, match="has started 8 processes without RANK and WORLD_SIZE"):
        processes.start()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    for present in (False, True):
        if present:
            monkeypatch.setenv(processes.UNSHARED, "1")
        torch.distributed.destroy_process_group()
        processes.start()
        warned = "needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err
        assert warned != present


# ---- GPUs (none is needed: what torch says of them is made up)

@pytest.fixture
def gpu(monkeypatch):
    """gpu(name=value, ...): these functions of torch.cuda return these values."""
    def pretend(**values):
        for name, value in values.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    return pretend


@pytest.mark.parametrize("visible,local_rank,W,index", [(4, 3, 4, 3), (1, 3, 4, 0), (4, 0, 1, 0)])
def test_a_process_takes_a_gpu_that_it_sees(visible, local_rank, W, index, gpu, monkeypatch,
                                            capsys):
    """Of four GPUs, or its own alone, as srun --gpus-per-task=1 shows it. GPUs that stay idle are
    named."""
    chosen, group = [], processes.dist
    gpu(is_available=True, device_count=visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(group, "is_initialized", lambda: False)
    monkeypatch.setattr(group, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(processes, "check_gpu", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("WORLD_SIZE", str(W))
    assert processes.start() == torch.device("cuda", index)
    assert chosen == [torch.device("cuda", index)]
    said = "4 GPUs are visible, and this run uses one" in capsys.readouterr().out
    assert said == (W == 1)


@pytest.mark.parametrize("visible,refused", [("0", True), (None, True), ("", False)])
def test_a_gpu_that_torch_cannot_use_is_no_cpu(visible, refused, gpu, tmp_path, monkeypatch):
    """As with a driver that is too old: the run would go on a hundred times slower."""
    (tmp_path / "nvidia3").touch()
    monkeypatch.setattr(processes, "DEVICES", str(tmp_path / "nvidia[0-9]*"))
    gpu(is_available=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if refused:
        with pytest.raises(ValueError, match="cannot use a GPU of this machine"):
            processes.start()
    else:
        assert processes.start() == torch.device("cpu")


@pytest.mark.parametrize("capability,auto,others,sentence", [
    ((7, 0), torch.float16, [], "no kernels for Tesla V100 .compute capability 7.0."),
    ((7, 5), torch.float16, ["b", "c"], ""), ((12, 0), torch.bfloat16, ["b"], ""),
    ((8, 0), torch.bfloat16, ["b", "a"], "processes 0, 2 would share one GPU: start as many")])
def test_what_a_gpu_can(capability, auto, others, sentence, gpu, monkeypatch):
    """Kernels, precision, and one process. The architectures are those of torch 2.14."""
    gpu(get_device_capability=capability, get_device_name="Tesla V100",
        get_device_properties=Namespace(uuid="a"),
        get_arch_list=["sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_120"])
    monkeypatch.setattr(processes, "gather", lambda own: [own, *others])
    device = torch.device("cuda")
    assert processes.choose_precision("auto", device)[0] == auto
    assert processes.choose_precision("fp32", device)[0] == torch.float32
    with pytest.raises(ValueError, match=sentence) if sentence else nullcontext():
        processes.check_gpu(device)


def test_names_of_amd_gpus_are_no_capabilities(gpu, monkeypatch):
    gpu(get_device_capability=(9, 4), get_arch_list=["gfx90a", "gfx942"],
        get_device_properties=Namespace(uuid="a"))
    monkeypatch.setattr(processes, "gather", lambda own: [own])
    processes.check_gpu(torch.device("cuda"))           # does not raise


@pytest.mark.parametrize("bf16,auto", [(True, torch.bfloat16), (False, torch.float32)])
def test_precision_of_a_cpu(bf16, auto, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert processes.choose_precision("auto", torch.device("cpu"))[0] == auto


@pytest.mark.parametrize("error,sentence", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
     "CUDA out of memory: give fewer clips per process or a smaller --size, "
     "--chunk in pre-training, or --global-batch in fine-tuning"),
    (OSError("cannot write a.pt (No space left on device)"),
     "cannot write a.pt (No space left on device)"),
    (FloatingPointError("loss nan at step 3"), "loss nan at step 3"), (OSError(), "OSError"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. \nRaise its limit."),
     "DataLoader worker (pid 7) is killed by signal: Bus error. Raise its limit. A loading process "
     "ran out of memory, or a file crashes the decoder: python -m prepare.manifest with "
     "--verify finds such a file, and if you replace it, the same command goes on from what is "
     "saved")])
def test_an_expected_error_is_one_line(error, sentence, capsys):
    def job(args, device):
        raise error

    with pytest.raises(SystemExit) as stop:
        processes.launch(job, None)
    assert stop.value.code == 1 and capsys.readouterr().err == f"error: {sentence}\n"


# ---- two processes

@pytest.mark.slow
def test_batchnorm_of_two_processes_is_that_of_one(tmp_path):
    """Outputs, gradients and running statistics of two steps, in float64, beside nn.BatchNorm3d.
    The inputs are far from zero, where a careless variance loses its digits."""
    assert run_two(tmp_path, """
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
        """) == ["equal", "equal"]


@pytest.mark.slow
def test_processes_wait_for_a_slow_one_and_leave_together(tmp_path):
    """Here the group gives up after 2 s, in place of nccl's 10 minutes, and process 1 reads for
    5 s. Then process 0 writes for 4 s, and process 1 still works when process 0 has done its part.
    """
    words = run_two(tmp_path, """
        import time
        from datetime import timedelta
        import torch, torch.distributed as dist
        from data import make_loader
        from support.batches import evaluation_batches
        from support.processes import launch, rank, run_once

        class Clips(torch.utils.data.Dataset):
            clips_per_file = 1
            def __len__(self):
                return 4
            def __getitem__(self, n):
                time.sleep(2.5 * (n % 2))            # process 1 reads the clips 1 and 3
                return torch.ones(1), n, (n, None)

        def job(args, device):
            found = torch.zeros(4)
            for _, _, index in evaluation_batches(make_loader(Clips(), 1, 0), 0):
                found[index] = 1
            dist.all_reduce(found)
            run_once(lambda: time.sleep(4))
            print(*found.tolist(), flush=True)
            destroy = dist.destroy_process_group
            dist.destroy_process_group = lambda: (print("left", flush=True), destroy())
            time.sleep(rank())
            print("done", flush=True)

        dist.init_process_group("gloo", timeout=timedelta(seconds=2))
        launch(job, None)
        """)
    assert words.count("1.0") == 8
    assert [word for word in words if word != "1.0"] == ["done", "done", "left", "left"]


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
    out, flags = tmp_path / "out", [*SMALL, "--batch-per-process", "2", "--workers", "0"]
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


@pytest.mark.slow
def test_eight_processes(tree, tmp_path):
    """One of them is killed: the other seven end, and do not hang."""
    job = Job("pretrain.py", "--data", tree, "--split", "test", *SMALL, "--workers", 0,
              "--batch-per-process", 1, "--keep-every", 1, "--out", tmp_path, processes=8)
    job.wait_for((tmp_path / "checkpoint-1.pt").exists)
    job.workers[-1].kill()
    job.wait()
    assert [worker.exitcode for worker in job.workers] == [1] * 7 + [-signal.SIGKILL]
