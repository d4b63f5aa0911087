"""Processes and their devices.

In a running script a process group always exists: that of torchrun or Slurm, or one of a single
process. So a collective operation needs no special case for one process.
"""

import functools
import glob
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

# torchrun's restarted workers then start with a store of their own (pytorch/pytorch#135712).
UNSHARED = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
DEVICES = "/dev/nvidia[0-9]*"       # of NVIDIA's driver, a file for each GPU
# A scheduler sends the first two before it takes the machine away; Ctrl-C sends the third.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
INTERRUPTED = 130                   # exit status after Ctrl-C (128 + SIGINT, as shells have it)
PATIENCE = timedelta(hours=12)      # for a process that scans, evaluates or saves on a slow disk


def setup():
    """Set up the process group and return this process's device.

    The environment variables of torchrun (RANK, LOCAL_RANK, WORLD_SIZE) decide. Without them the
    group has one process. Raises ValueError if srun has started several that do not know of each
    other, or if a GPU cannot be used.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))          # of this srun
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(f"srun has started {tasks} processes without RANK and WORLD_SIZE, so each "
                         "would train alone: see the section Slurm of docs/running.md")
    with signals_blocked():                     # the fork server's processes inherit that
        if multiprocessing.get_start_method() == "forkserver":
            # It imports for all loading processes, while this process reads the data.
            multiprocessing.set_forkserver_preload(["torchvision", "torchaudio", "av"])
            multiprocessing.forkserver.ensure_running()
    cuda, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
    if not cuda and glob.glob(DEVICES) and not hidden:
        raise ValueError(f"torch {torch.__version__} cannot use a GPU of this machine: was one "
                         "asked for (Slurm: --gpus-per-node)? If nvidia-smi shows one, this torch "
                         "may be a build for CPUs, or the driver needs the versions in the section "
                         "on older drivers of docs/running.md; with CUDA_VISIBLE_DEVICES= in the "
                         "environment the CPU is used")
    if cuda:
        # A launcher may show each process its own GPU alone, which is then device 0 of each.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    else:
        device = torch.device("cpu")
        torch.set_num_threads(cores_per_process())
    if not dist.is_initialized():
        alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
        if cuda and alone and torch.cuda.device_count() > 1:
            say(f"{torch.cuda.device_count()} GPUs are visible, and this run uses one: start it "
                "with torchrun --nproc_per_node=N to use N")
        store = dict(store=dist.HashStore(), rank=0, world_size=1) if alone else {}
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **store)
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and UNSHARED not in os.environ:
            say(f"warning: torchrun --max-restarts needs {UNSHARED}=1 in its environment, "
                "otherwise restarted processes look for the dead ones (pytorch/pytorch#135712)",
                sys.stderr)
        if cuda:
            check_gpu(device)
    return device


def check_gpu(device):
    """Raise ValueError if the installed torch has no kernels for a GPU as old as this one, and on
    all processes if two of them have the same GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    known = [int(arch[3:]) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")
             and arch[3:].isdecimal()]
    if 10 * major + minor < min(known, default=0):      # sm_75, ...; later GPUs compile the newest
        raise ValueError(f"torch {torch.__version__} has no kernels for "
                         f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}"
                         "): install the versions in the section on V100 and older drivers of "
                         "docs/running.md")
    uuids = gather(str(torch.cuda.get_device_properties(device).uuid))
    shared, processes = Counter(uuids).most_common(1)[0]
    if processes > 1:
        ranks = ", ".join(str(n) for n, uuid in enumerate(uuids) if uuid == shared)
        raise ValueError(f"processes {ranks} would share one GPU: start as many processes on a "
                         "machine as it has GPUs, or set CUDA_VISIBLE_DEVICES= for CPUs")


def rank():
    """The number of this process among all processes, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@functools.cache
def patient_group():
    """All processes, which wait for each other for 12 hours. The default group waits 30 minutes."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def gather(value):
    """The value of each process, a list in the order of their ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, group=patient_group())
    return values


def run_once(job):
    """Run job() on process 0, while the others wait. All raise its ValueError, or its OSError as a
    ValueError."""
    error = None
    if rank() == 0:
        try:
            job()
        except (ValueError, OSError) as cause:
            error = str(cause)
    error, *_ = gather(error)
    if error is not None:
        raise ValueError(error)


def say(text, file=None):
    """Print a line once: process 0 prints it, the others do not."""
    if rank() == 0:
        print(text, file=file, flush=True)


def cores_per_process():
    """The number of cores for this process: the processes of a machine share its cores."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@contextmanager
def signals_blocked():
    """Processes that are started in here, and theirs, do not see SIGTERM, SIGUSR1 and SIGINT.

    A signal to the whole process group must not end the loading processes, nor the server that
    forks them: the trainer needs batches until it has saved. This process gets the signal later.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    multiprocessing.resource_tracker.ensure_running()
    # In some versions of Python the start of the resource tracker has unblocked SIGTERM.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_trainer(_):
    """Let a worker end if the trainer dies. Under a fork server torch watches the server instead,
    and that lives as long as its workers."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_workers():
    """Kill the workers when the trainer exits, because its SIGTERM does not reach them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()
