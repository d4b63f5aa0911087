"""What commands share: types of numbers, the flags of a training, and errors in one line."""

import argparse
import sys
from contextlib import contextmanager, suppress


def bounded(kind, accepts, rule):
    """An argparse type: kind(text) if accepts(value) is true, otherwise an error with the rule."""
    def convert(text):
        with suppress(ValueError):
            value = kind(text)
            if accepts(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {rule}")

    return convert


def at_least(low, kind=int):
    """An argparse type: a whole number (or a number, if kind is float) of `low` or more."""
    number = "a whole number" if kind is int else "a number"
    return bounded(kind, lambda x: x >= low, f"{number} of {low} or more")


positive = bounded(float, lambda x: 0 < x < float("inf"), "a number above 0")
fraction = bounded(float, lambda x: 0 < x <= 1, "a share above 0 and at most 1")
share = bounded(float, lambda x: 0 <= x < 1, "a share of 0 or more and less than 1")


def add_reading_flags(parser):
    """Add the flags of a script that reads videos."""
    parser.add_argument("--workers", type=at_least(0), help="loading processes of each process "
                        "(default: the cores per process but one, at most 8; our choice)")
    parser.add_argument("--max-failures", type=share, default=0.05,
                        help="share of clips that may fail to be read: training replaces them, and "
                        "clearly more stop it; a test leaves them out, and more stop it (0.05; our "
                        "choice)")


def add_run_flags(parser):
    """Add the flags of a script that trains. Returns their group."""
    run = parser.add_argument_group("running")
    run.add_argument("--seed", type=at_least(0), default=0,
                     help="of weights, order and draws (0; our choice)")
    run.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
                     help="of the encoders (auto; our choice: bf16 where the hardware has it, fp16 "
                     "on older GPUs, else fp32)")
    add_reading_flags(run)
    run.add_argument("--save-every", type=at_least(0, float), default=10,
                     help="minutes between checkpoints (10; our choice; 0: one every 10 steps)")
    run.add_argument("--keep-every", type=at_least(1), metavar="E",
                     help="keep the checkpoint of every E-th epoch, as checkpoint-<epoch>.pt "
                     "(none; our choice)")
    return run


@contextmanager
def errors_in_one_line(kept=""):
    """An expected error in here becomes one line on stderr and exit status 1, and Ctrl-C becomes
    one line and status 130. kept: what is kept after Ctrl-C. (Scripts with a process group have
    support.launch.)"""
    try:
        yield
    except (ValueError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        sys.exit(f"error: {lines[-1]}")
    except KeyboardInterrupt:
        print(f"stopped{kept}", file=sys.stderr)
        sys.exit(130)                               # as shells have it for SIGINT
