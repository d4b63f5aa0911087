"""Speed and memory of a training step against what the hardware allows.

    python -m experiments.bench step            # a training step over the bare encoders
    python -m experiments.bench step --batch-size 64 --chunk 8      # and in chunks of 8 clips

`--batch-size 8 16 32 ...` goes on until the memory is full. `step` yields what it measured with its
{quantity: value}. They are printed, and `--csv FILE` adds a line to FILE for each value.
"""

import argparse
import csv
import io
import os
import platform
import re
import statistics
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import av
import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import pretrain
from augment import LogMel, normalize_frames
from support.commands import at_least
from support.precision import autocast, choose_precision
from support.launch import is_out_of_memory
from support.processes import setup
from support.reading import RATE
from support.rows import Row


def now(device):
    """The time in s, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def forget_peak(device):
    """Forget the peak of the memory up to now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()        # the search for the fastest convolutions took the rest
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """The peak since then in bytes: of torch's memory on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


class Steps:
    """What pretrain.train iterates over in place of a Run: a made-up batch, again and again.

    So the loop of pretrain.py itself is timed, from the moment at which a Run would hand it a
    batch. Between two steps the bare encoders f and g run, forward and backward, on `chunk` clips
    at a time (None: on all). `ours` and `bare` are lists of s, `flops` is the number of operations
    of the bare encoders, `peak` the memory of a step in bytes, and `table` what the profiler saw.
    """

    def __init__(self, rounds, chunk, profile):
        self.rounds, self.chunk, self.profile = rounds, chunk, profile
        self.ours, self.bare, self.table = [], [], ""

    def begin(self, args, loader, model, optimizer, scaler, metadata):
        """Take the arguments of Run, in its place."""
        self.args, self.model, self.device = args, model, next(model.parameters()).device
        self.dtype, _ = choose_precision(args.precision, self.device)
        return self

    def log(self, **measures):
        """Take the measures of a step, which are those of noise."""

    def write(self, state, name):
        """Take the trained encoders, which are not kept."""

    def __iter__(self):
        args, device = self.args, self.device
        B, T, size = args.batch_per_process, args.frames, args.size
        frames = torch.randint(0, 256, (B, 2, T, size, size, 3), dtype=torch.uint8)
        waves = torch.randn(B, 2, RATE) * 0.1                           # 1 s of sound
        batch = [x.pin_memory() if device.type == "cuda" else x for x in (frames, waves)]
        c = self.chunk or B                                                     # clips at a time
        video = normalize_frames(frames[:c].to(device)).flatten(0, 1)           # (c K, 3, T, H, W)
        audio = LogMel().to(device)(waves[:c].to(device)).flatten(0, 1)         # (c K, 1, M, F)
        encoders = self.model.f, self.model.g
        if args.compile:
            encoders = [torch.compile(encoder) for encoder in encoders]
        for n in range(self.rounds + 1):
            began = now(device)
            yield 0, [x.to(device, non_blocking=True) for x in batch]
            stepped = now(device)
            self.model.zero_grad(set_to_none=True)
            for _ in range(B // c):
                self.encode(encoders, video, audio)
            if n:
                self.ours.append(stepped - began)
                self.bare.append(now(device) - stepped)
        with FlopCounterMode(display=False) as counter:         # of 2 views, which fit anywhere
            self.encode((self.model.f, self.model.g), video[:2], audio[:2])
        self.flops = counter.get_total_flops() * B
        del video, audio
        forget_peak(device)
        yield 0, [x.to(device, non_blocking=True) for x in batch]
        self.peak = peak_memory(device)
        if self.profile:
            with torch.profiler.profile() as profiler:
                yield 0, [x.to(device, non_blocking=True) for x in batch]
                now(device)
            by = f"self_{device.type}_time_total"
            self.table = profiler.key_averages().table(by, row_limit=10)

    def encode(self, encoders, *inputs):
        """The bare encoders, forward and backward."""
        with autocast(self.device, self.dtype):
            outputs = [encoder(x) for encoder, x in zip(encoders, inputs)]      # (B K, C) x 2
        sum(y.float().mean() for y in outputs).backward()


def train(flags, rounds, device, chunk=None, profile=False):
    """Run pretrain.train with these flags on made-up data. Returns its Steps.

    chunk: how many clips the bare encoders take at a time, None for the whole batch.
    """
    # At this learning rate the weights stay finite on noise.
    args = pretrain.parse(["--data", "made up", "--lr", "0.001", *flags])
    steps = Steps(rounds, chunk, profile)
    long = Row("made up", "", "train", 1e6, 1e6, True, "")          # enough for any clip
    rows = [long] * args.batch_per_process, {}
    with (patch("pretrain.lock_folder"), patch("pretrain.Run", steps.begin),
          patch("pretrain.find_rows", lambda *_: rows), redirect_stdout(io.StringIO())):
        pretrain.train(args, device)
    return steps


def step(args):
    device = setup()
    common = ["--arch", args.arch, "--frames", str(args.frames), "--size", str(args.size)]
    common += ["--precision", args.precision] + ["--compile"] * args.compile
    for B in args.batch_size:
        if args.compile:
            torch.compiler.reset()          # otherwise the second B would compile for any B
        # With --chunk: a batch of one chunk, the batch in chunks, and the batch as a whole.
        kinds = [(args.chunk, []), (B, ["--chunk", str(args.chunk)])] if args.chunk else []
        done = []
        for clips, flags in [*kinds, (B, [])]:
            flags = [*common, "--batch-per-process", str(clips), *flags]
            try:
                done.append(train(flags, args.rounds, device, args.chunk, args.profile))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                yield f"B {clips} does not fit the memory: {str(error).splitlines()[0]}", {}
                break
            if args.profile:
                print(done[-1].table)
            yield of_step(done[-1])
        if len(done) > 1:
            yield of_chunks(*done)
        if len(done) <= len(kinds):
            break


def of_step(steps):
    """What the Steps of one batch size have measured."""
    args, dtype, cuda = steps.args, str(steps.dtype)[6:], steps.device.type == "cuda"
    B, size = args.batch_per_process, 8192 if cuda else 2048
    a, b = (torch.randn(size, size, device=steps.device, dtype=steps.dtype) for _ in range(2))
    matmul = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    limit = 2 * size ** 3 / min(matmul.blocked_autorange().times)                   # FLOP/s
    rate = steps.flops / min(steps.ours)                                            # FLOP/s
    what = f"step {args.arch} B{B} T{args.frames} {args.size}px {dtype}"
    what += f" chunks of {args.chunk}" if args.chunk else ""
    what += " compiled" if args.compile else ""
    # Beside --chunk the bare encoders take chunks, also where the step does not.
    over = "step / bare in chunks" if steps.chunk else "step / bare"
    ratios = [ours / bare for ours, bare in zip(steps.ours, steps.bare)]            # of the rounds
    low, middle, high = statistics.quantiles(ratios, n=4)
    values = {
        over: middle, f"{over}, first quartile": low, f"{over}, third quartile": high,
        "s": min(steps.ours), "clips per s": B / min(steps.ours), "TFLOP/s": rate / 1e12,
        "share of matmul rate": rate / limit, "peak memory, GB": steps.peak / 1e9}
    if cuda:
        values["hours on 8 for 231k clips, 100 epochs"] = 231e5 / 8 / values["clips per s"] / 3600
    return what, values


def of_chunks(one, chunked, whole=None):
    """Compare a batch in chunks with a batch of one chunk and, if that fits, with itself whole."""
    args, values = chunked.args, {"peak memory / of one chunk": chunked.peak / one.peak}
    if whole:
        # Each step is divided by the bare encoders of its own round, which take chunks in both.
        over, base = (statistics.median(a / b for a, b in zip(x.ours, x.bare))
                      for x in (chunked, whole))
        values |= {"time / whole": over / base, "peak memory / whole": chunked.peak / whole.peak}
    return f"step {args.arch} B{args.batch_per_process} in chunks of {args.chunk}", values


def hardware():
    """Number and kind of the cores, the GPU if there is one, and versions."""
    cpu = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    text = (f"{len(os.sched_getaffinity(0))} core(s) of {cpu[1] if cpu else platform.machine()}"
            f", torch {torch.__version__}, av {av.__version__}")
    if torch.cuda.is_available():
        text += f", {torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}"
    return text


def record(path, what, values):
    """Add a line for each of the values {quantity: value} to a csv."""
    command = " ".join(["python -m experiments.bench", *sys.argv[1:]])
    about = [time.strftime("%Y-%m-%d"), hardware(), command, what]
    lines = [[*about, name, f"{value:.4g}"] for name, value in values.items()]
    if not Path(path).exists():
        lines.insert(0, ["date", "hardware", "command", "what", "quantity", "value"])
    with open(path, "a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def main():
    """Run the command."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("what", choices=["step"])
    p.add_argument("--rounds", type=at_least(2), default=15, help="measured rounds (15)")
    p.add_argument("--csv", help="file to add the results to (none)")
    p.add_argument("--arch", default="r2plus1d_10", help="video encoder (r2plus1d_10)")
    p.add_argument("--batch-size", type=int, nargs="+", default=[32],
                   help="clips, one or more sizes, the smallest first (32)")
    p.add_argument("--chunk", type=at_least(2),
                   help="beside it time the same batch in chunks of so many clips, and a batch of "
                   "one chunk (none)")
    p.add_argument("--frames", type=int, default=4, help="T (4)")
    p.add_argument("--size", type=int, default=32, help="H = W in pixels (32)")
    p.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
                   help="of the encoders (auto)")
    p.add_argument("--compile", action="store_true", help="torch.compile (off)")
    p.add_argument("--profile", action="store_true", help="where the time goes (off)")
    args = p.parse_args()
    if any(B % (args.chunk or B) for B in args.batch_size):
        p.error(f"--chunk {args.chunk} does not divide every --batch-size")
    print(hardware())
    for what, values in step(args):
        print(what, *(f"    {name}: {value:.4g}" for name, value in values.items()), sep="\n",
              flush=True)
        if args.csv:
            record(args.csv, what, values)


if __name__ == "__main__":
    main()
