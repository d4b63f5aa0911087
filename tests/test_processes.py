"""support/processes.py, support/launch.py: processes, hosts and schedulers of a cluster."""

import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, Job, run_two, write_text

from support import launch, processes
from support.precision import choose_precision
from support.run import REQUEUE


def test_what_a_launcher_has_left_out(monkeypatch, capsys):
    """srun without ranks is refused, torchrun without stores for restarts warned of."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ValueError, match="has started 8 processes without RANK and WORLD_SIZE"):
        processes.setup()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    for warned in (True, False):
        torch.distributed.destroy_process_group()
        processes.setup()
        errors = capsys.readouterr().err
        assert ("needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in errors) == warned
        monkeypatch.setenv(processes.UNSHARED, "1")


# ---- GPUs (none is needed: what torch says of them is made up)

@pytest.mark.parametrize("visible,local_rank,W,index", [(4, 3, 4, 3), (1, 3, 4, 0), (4, 0, 1, 0)])
def test_a_process_takes_a_gpu_that_it_sees(visible, local_rank, W, index, monkeypatch, capsys):
    """Of four GPUs, or its own alone, as srun may show it. GPUs that stay idle are named."""
    device, chosen = torch.device("cuda", index), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(processes, "check_gpu", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("WORLD_SIZE", str(W))
    assert processes.setup() == device and chosen == [device]
    said = capsys.readouterr().out
    assert ("4 GPUs are visible, and this run uses one" in said) == (W == 1)


def test_a_gpu_that_torch_cannot_use_is_no_cpu(tmp_path, monkeypatch):
    """As with a driver that is too old: the run would go on a hundred times slower."""
    (tmp_path / "nvidia3").touch()
    monkeypatch.setattr(processes, "DEVICES", str(tmp_path / "nvidia[0-9]*"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes.setup() == torch.device("cpu")     # all GPUs are hidden
    for change in (partial(monkeypatch.setenv, value="0"), monkeypatch.delenv):
        change("CUDA_VISIBLE_DEVICES")
        with pytest.raises(ValueError, match="cannot use a GPU of this machine"):
            processes.setup()


NVIDIA = ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_120"]     # of torch 2.14


@pytest.mark.parametrize("capability,kernels,auto,others,sentence", [
    ((7, 0), NVIDIA, torch.float16, [], "no kernels for Tesla V100 .compute capability 7.0."),
    ((7, 5), NVIDIA, torch.float16, ["b", "c"], ""),
    ((9, 4), ["gfx90a", "gfx942"], torch.bfloat16, [], ""),
    ((8, 0), NVIDIA, torch.bfloat16, ["b", "a"], "processes 0, 2 would share one GPU: start as")])
def test_what_a_gpu_can(capability, kernels, auto, others, sentence, monkeypatch):
    """AMD's names of kernels are no capabilities."""
    for name, value in (("capability", capability), ("name", "Tesla V100"),
                        ("properties", Namespace(uuid="a"))):
        monkeypatch.setattr(torch.cuda, f"get_device_{name}", lambda _, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: kernels)
    monkeypatch.setattr(processes, "gather", lambda own: [own, *others])
    device = torch.device("cuda")
    assert choose_precision("auto", device)[0] == auto
    assert choose_precision("fp32", device)[0] == torch.float32
    with pytest.raises(ValueError, match=sentence) if sentence else nullcontext():
        processes.check_gpu(device)


@pytest.mark.parametrize("bf16,auto", [(True, torch.bfloat16), (False, torch.float32)])
def test_precision_of_a_cpu(bf16, auto, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert choose_precision("auto", torch.device("cpu"))[0] == auto


FULL = ("give fewer clips per process or a smaller --size, --chunk in pre-training, or "
        "--global-batch in fine-tuning, and another --out if this one has a checkpoint")
DIED = ("a loading process ran out of memory, or a file crashes the decoder; python -m "
        "prepare.manifest with --verify finds such a file, and if you replace it, the same command "
        "goes on from what is saved")


@pytest.mark.parametrize("error,sentence", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
     f"CUDA out of memory: {FULL}"),
    (RuntimeError("GET was unable to find an engine to execute this computation"),     # cuDNN
     f"GET was unable to find an engine to execute this computation: {FULL}"),
    (FloatingPointError("loss nan at step 3"), "loss nan at step 3"), (OSError(), "OSError"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. \nRaise its limit."),
     f"DataLoader worker (pid 7) is killed by signal: Bus error. Raise its limit: {DIED}"),
    (ConnectionResetError(104, "Connection reset by peer"),     # in the middle of a batch
     f"[Errno 104] Connection reset by peer: {DIED}"), (EOFError(), f"EOFError: {DIED}")])
def test_an_expected_error_is_one_line(error, sentence, capsys):
    def job(args, device):
        raise error

    with pytest.raises(SystemExit) as stop:
        launch.launch(job, None)
    assert stop.value.code == 1 and capsys.readouterr().err == f"error: {sentence}\n"


def test_a_second_word_of_a_dead_loading_process_is_not_told(capfd):
    """The DataLoader raises in the handler of SIGCHLD too, which may come while launch waits."""
    def again(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    def job(args, device):
        signal.signal(signal.SIGCHLD, again)
        subprocess.Popen(["sleep", "0.05"])
        raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(SystemExit):
        launch.launch(job, None)
    assert capfd.readouterr().err == f"error: [Errno 104] Connection reset by peer: {DIED}\n"


# ---- several processes

@pytest.mark.slow
def test_processes_wait_for_a_slow_one_and_leave_together(tmp_path):
    """The group gives up after 2 s. Process 1 reads for 5 s, then process 0 writes for 4 s, and
    process 1 still works when process 0 has done its part."""
    assert run_two(tmp_path, """
        import time
        from datetime import timedelta
        import torch, torch.distributed as dist
        from data import make_loader
        from support.batches import evaluation_batches
        from support.launch import launch
        from support.processes import rank, run_once

        class Clips(torch.utils.data.Dataset):
            clips_per_file = 1
            def __len__(self):
                return 4
            def __getitem__(self, n):
                time.sleep(2.5 * (n % 2))       # process 1 reads the clips 1 and 3
                return torch.ones(1), n, (n, None)

        def job(args, device):
            batches = list(evaluation_batches(make_loader(Clips(), 1, 0), 0))
            dist.barrier()
            assert len(batches) == 2
            run_once(lambda: time.sleep(4))
            destroy = dist.destroy_process_group
            dist.destroy_process_group = lambda: (print("left", flush=True), destroy())
            time.sleep(rank())
            print("done", flush=True)

        dist.init_process_group("gloo", timeout=timedelta(seconds=2))
        launch(job, None)
        """) == ["done", "done", "left", "left"]


@pytest.mark.slow
def test_eight_processes(tree, tmp_path):
    """One of them is killed: the other seven end, and do not hang."""
    job = Job("pretrain.py", "--data", tree, "--split", "test", *SMALL, "--workers", 0,
              "--batch-per-process", 1, "--keep-every", 1, "--out", tmp_path, processes=8)
    job.wait_for((tmp_path / "checkpoint-1.pt").exists)
    job.workers[-1].kill()
    job.wait()
    assert [worker.exitcode for worker in job.workers] == [1] * 7 + [-signal.SIGKILL]


SRUN = f"""#!{sys.executable}
# In place of srun --kill-on-bad-exit=1: of two tasks, one that fails takes the other with it.
# Task 1 takes 5 s longer to exit, as if it had a GPU to give back.
import os, signal, subprocess, sys
tasks = [subprocess.Popen(sys.argv[sys.argv.index("bash"):], env=os.environ | {{
    "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n), "SLURM_NTASKS": "2",
    "PYTHONPATH": "slow_exit" if n else ""}}) for n in range(2)]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
states = [os.waitstatus_to_exitcode(os.wait()[1])]
for task in tasks if states[0] else []:
    task.kill()
states.append(os.waitstatus_to_exitcode(os.wait()[1]))
sys.exit(max(128 - state if state < 0 else state for state in states))
"""
SCONTROL = """#!/bin/sh
case $1 in show) echo localhost;; requeue) echo $2 >> requeued;; esac
"""


@pytest.mark.slow
def test_the_slurm_script_continues_itself(tree, tmp_path):
    """The first process to exit has srun kill the other, so the status is not REQUEUE."""
    script = re.search(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```",
                       (ROOT / "docs/running.md").read_text(), re.DOTALL)[1]
    out, log = tmp_path / "out", tmp_path / "out" / "log.jsonl"
    flags = ["--data", str(tree), *SMALL, "--batch-per-process", "2", "--workers", "0"]
    for old, new in (("runs/k400", str(out)), ("--data k400.csv", f"{' '.join(flags)} --epochs 9"),
                     ("python pretrain.py", f"{sys.executable} {ROOT / 'pretrain.py'}")):
        script = script.replace(old, new)
    (tmp_path / "job.sh").write_text(script)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        write_text(tmp_path / "bin" / name, text).chmod(0o755)
    slow_exit = write_text(tmp_path / "slow_exit" / "sitecustomize.py",
                           "import atexit, time\natexit.register(time.sleep, 5)\n")
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "localhost", "LOCAL_WORLD_SIZE": "2"}
    submit = partial(subprocess.Popen, ["bash", "job.sh"], cwd=tmp_path, env=environment,
                     text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    job = submit()
    while not log.exists() or log.read_text().count("\n") < 2:
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    srun, = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(srun), signal.SIGUSR1)
    text = job.communicate(timeout=60)[0]
    assert "saved at step " in text
    assert job.returncode > REQUEUE, text   # one of the two was killed
    assert (tmp_path / "requeued").read_text() == "7\n"
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    slow_exit.unlink()
    again = submit()
    assert f"at step {step} of 18" in again.communicate()[0] and again.returncode == 0
    assert (tmp_path / "requeued").read_text() == "7\n"
    assert not (out / "requeue").exists()
