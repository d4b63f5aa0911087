"""How a script runs and ends: its processes, and its expected errors in one line."""

import os
import re
import signal
import sys
import time

import torch
import torch.distributed as dist

from support.processes import INTERRUPTED, gather, rank, say, setup, world_size


def launch(job, args):
    """Run job(args, device). An expected error becomes one line on stderr and exit status 1.

    Ctrl-C becomes one line too, and exit status 130. Training saves first, see support.run.
    """
    try:
        try:
            job(args, setup())
        except (RuntimeError, ConnectionError, EOFError) as error:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # no second word of a dead process
            time.sleep(0.1)     # if Ctrl-C has ended a peer, its Ctrl-C to this process counts
            if (sentence := explain(error)) is None:
                raise
            raise ValueError(sentence) from None
    except SystemExit:
        cleanup()
        raise
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)        # a second one ends it at once
        say("stopped by Ctrl-C; the same command goes on from what is saved", sys.stderr)
        exit_alone(INTERRUPTED)
    except (ValueError, FloatingPointError, OSError) as error:
        # An error of a loading process carries that process's traceback before its sentence.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        sentence = lines[-1].removeprefix("ValueError: ")
        where = f" on rank {rank()}" if rank() else ""
        print(f"error{where}: {sentence}", file=sys.stderr, flush=True)
        exit_alone(1)
    cleanup()


def explain(error):
    """What to do if a GPU's memory is full, or if a loading process has died; None for others."""
    cause = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if is_out_of_memory(error):
        return (f"{cause.split('.')[0]}: give fewer clips per process or a smaller --size, --chunk "
                "in pre-training, or --global-batch in fine-tuning, and another --out if this one "
                "has a checkpoint")
    # A loading process that dies while it hands over a batch breaks a connection.
    if isinstance(error, RuntimeError) and not cause.startswith("DataLoader "):
        return None
    return (f"{cause}: a loading process ran out of memory, or a file crashes the decoder; python "
            "-m prepare.manifest with --verify finds such a file, and if you replace it, the same "
            "command goes on from what is saved")


def is_out_of_memory(error):
    """Whether a GPU's memory is full, which cuDNN and cuBLAS say in words of their own."""
    return (isinstance(error, torch.OutOfMemoryError)
            or re.search("unable to find an engine|ALLOC_FAILED", str(error)) is not None)


def cleanup():
    """End the process group once all processes are done: a process that closes its connections
    while a peer still talks can abort that peer."""
    gather(None)
    dist.destroy_process_group()


def exit_alone(status):
    """Exit with a status, without waiting for the other processes."""
    if world_size() > 1:
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
