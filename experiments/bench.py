"""Speed against what the hardware allows. Ratios come first: both sides are timed in turn.

    python -m experiments.bench step            # a training step over the bare encoders
    python -m experiments.bench step --batch-size 64 --chunk 8      # and in chunks of 8 clips
    python -m experiments.bench loss            # Eq. 3 at global batches of 512 to 32,768
    python -m experiments.bench saving          # how long a checkpoint holds training up
    python -m experiments.bench scaling         # 2 processes, and 2 runs, over 1 on two cores
    python -m experiments.bench retrieval       # ranks in pools of 1,000 to 32,000 clips
    python -m experiments.bench loader          # a sample over the bare decode of its window
    python -m experiments.bench rows            # start-up and memory with 240,000 files
    python -m experiments.bench scan            # files per second of the scan
    python -m experiments.bench frames          # wrong frames, beside other libraries

`step --batch-size 8 16 32 ...` goes on until the memory is full. Each bench yields (text, what,
values): the text is printed, and `--csv FILE` adds a line to FILE for each value.
"""

import argparse
import csv
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from unittest.mock import patch

import av
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import pretrain
from augment import LogMel, normalize_frames
from data import AudioVisualClips, Row, make_loader
from experiments import bench_data
from experiments.timing import forget_peak, peak_memory, ratio, turns, wait_for
from loss import soft_info_nce
from prepare import demo
from retrieval import ranks
from support.processes import autocast, choose_precision, start
from support.reading import RATE
from support.run import Run

MADE_UP = [Row("made up", "", "train", 1e6, 1e6, True, "")]     # a file long enough for any clip


class Steps:
    """What pretrain.train iterates over in place of a Run: a made-up batch, again and again.

    So the loop of pretrain.py itself is timed, from the moment at which a Run would hand it a
    batch. Between two steps the bare encoders f and g run, forward and backward, on `chunk` clips
    at a time (None: on all). `ours` and `bare` are lists of s, `flops` is the number of operations
    of the bare encoders, `peak` the memory of a step in bytes, and `kernels` are what the profiler
    saw in a step.
    """

    def __init__(self, rounds, chunk, profile):
        self.rounds, self.chunk, self.profile = rounds, chunk, profile
        self.ours, self.bare, self.peak, self.kernels = [], [], 0, []

    def begin(self, args, loader, model, optimizer, scaler, metadata):
        """Take the arguments of Run, in its place."""
        self.args, self.model, self.device = args, model, next(model.parameters()).device
        self.dtype, self.why = choose_precision(args.precision, self.device)
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
            wait_for(device)
            times = [time.perf_counter()]
            yield 0, [x.to(device, non_blocking=True) for x in batch]
            wait_for(device)
            times.append(time.perf_counter())
            self.model.zero_grad(set_to_none=True)
            for _ in range(B // c):
                self.encode(encoders, video, audio)
            wait_for(device)
            times.append(time.perf_counter())
            if n:
                self.ours.append(times[1] - times[0])
                self.bare.append(times[2] - times[1])
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
                wait_for(device)
            self.kernels = profiler.key_averages()

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
    rows = MADE_UP * args.batch_per_process, {}
    with (patch("pretrain.lock_folder"), patch("pretrain.Run", steps.begin),
          patch("pretrain.find_rows", lambda *_: rows),
          redirect_stdout(io.StringIO())):
        pretrain.train(args, device)
    return steps


def step(args):
    device = start()
    common = ["--arch", args.arch, "--frames", str(args.frames), "--size", str(args.size),
              *["--compile"] * args.compile]
    for B in args.batch_size:
        if args.compile:
            torch.compiler.reset()          # otherwise the second B would compile for any B
        # With --chunk: a batch of one chunk, the batch in chunks, and the batch as a whole.
        kinds = [(args.chunk, None), (B, args.chunk)] * bool(args.chunk) + [(B, None)]
        done = []
        for clips, chunk in kinds:
            flags = ["--batch-per-process", str(clips), *["--chunk", str(chunk)] * bool(chunk)]
            try:
                done.append(train(common + flags, args.rounds, device, args.chunk, args.profile))
            except RuntimeError as error:   # cuDNN and cuBLAS name a full memory in other words
                full = re.search("unable to find an engine|ALLOC_FAILED", str(error))
                if not full and not isinstance(error, torch.OutOfMemoryError):
                    raise
                yield f"B {clips} does not fit the memory: {str(error).splitlines()[0]}", "", {}
                break
            yield of_step(done[-1])
        if len(done) > 1:
            yield of_chunks(*done)
        if len(done) < len(kinds):
            break


def of_chunks(one, chunked, whole=None):
    """Compare a batch in chunks with a batch of one chunk and, if that fits, with itself whole."""
    args = chunked.args
    memory = chunked.peak / one.peak
    lines = [f"in chunks: peak memory {memory:.2f} times that of a batch of one chunk"]
    values = {"peak memory / of one chunk": memory}
    if whole:
        # Each step is divided by the bare encoders of its own round, which take chunks in both.
        over, base = (statistics.median(a / b for a, b in zip(x.ours, x.bare))
                      for x in (chunked, whole))
        values |= {"time / whole": over / base, "peak memory / whole": chunked.peak / whole.peak}
        lines.append(f"over the whole batch at once: time {over / base:.2f} times, peak memory "
                     f"{chunked.peak / whole.peak:.2f} times")
    what = f"step {args.arch} B{args.batch_per_process} in chunks of {args.chunk}"
    return "\n".join(lines), what, values


def of_step(steps):
    """What the Steps of one batch size have measured."""
    args, dtype, device = steps.args, str(steps.dtype)[6:], steps.device
    B = args.batch_per_process
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=steps.dtype) for _ in range(2))
    matmul, = turns([lambda: a @ b], steps.rounds, device)
    seconds, (over, text) = min(steps.ours), ratio(steps.ours, steps.bare)
    rate, limit = steps.flops / seconds, 2 * size ** 3 / min(matmul)            # FLOP/s
    # Beside --chunk the bare encoders take chunks, also where the step does not.
    name = "step / bare" + " in chunks" * bool(steps.chunk)
    values = {name: over, "clips per s": B / seconds,
              "share of matmul rate": rate / limit}
    what = (f"step {args.arch} B{B} T{args.frames} {args.size}px {dtype}"
            f"{f' chunks of {args.chunk}' if args.chunk else ''}{' compiled' * args.compile}")
    lines = [f"{what} ({steps.why}), K 2, {torch.get_num_threads()} thread(s)",
             f"step / bare encoders{' in chunks' * bool(steps.chunk)}: {text}",
             f"step {seconds:.3f} s, {values['clips per s']:.1f} clips/s; bare "
             f"{min(steps.bare):.3f} s; {rate / 1e12:.2f} TFLOP/s, {100 * rate / limit:.0f} % of "
             f"the {limit / 1e12:.2f} of a {dtype} matmul; peak memory {steps.peak / 1e9:.1f} GB"]
    values["peak memory, GB"] = steps.peak / 1e9
    if device.type == "cuda":
        hours = 231e5 / 8 / values["clips per s"] / 3600
        values["hours on 8 for 231k clips, 100 epochs"] = hours
        lines.append("the paper's 231k clips x 100 epochs on 8 of these at this rate, without "
                     f"anything else: {hours:.1f} h")
    return "\n".join(lines + kernels(steps.kernels, device)), what, values


def kernels(events, device):
    """Lines for the ten kernels (on a CPU: operations) that take most of a step's time."""
    cuda = device.type == "cuda"
    spent = sorted(((e.self_device_time_total if cuda else e.self_cpu_time_total, e.key, e.count)
                    for e in events if not e.is_user_annotation
                    and (not cuda or e.device_type != torch.autograd.DeviceType.CPU)), reverse=True)
    return [f"{100 * t / sum(x[0] for x in spent):5.1f} %  {count:4} x  {name[:80]}"
            for t, name, count in spent[:10]]


def loss(args):
    device, first = start(), None
    B, K, C, D = 8, 2, 512, 256
    y_a, y_v = (torch.randn(B, K, C, device=device).relu().requires_grad_() for _ in range(2))
    z_a, z_v = (F.normalize(torch.randn(B, K, D, device=device), dim=2).requires_grad_()
                for _ in range(2))
    for N in (512, 2048, 8192, 32768):
        others = F.normalize(torch.randn(N - B, K, D, device=device), dim=2).requires_grad_()
        held = {}                           # bytes of each storage that the backward pass needs

        def keep(x):
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        def both():                         # the clips of the other processes are made up
            with patch("loss.all_gather", lambda z: torch.cat([z, others])):    # (N, K, D)
                L = soft_info_nce(y_a, y_v, z_a, z_v)
            torch.autograd.grad(L, [y_a, y_v, z_a, z_v, others])

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            both()
        spent, = turns([both], args.rounds, device)
        ms, megabytes = 1000 * min(spent), sum(held.values()) / 1e6
        first = first or (ms, megabytes)
        yield (f"N {N}: {ms:.2f} ms ({ms / first[0]:.1f} times that of 512), {megabytes:.1f} MB "
               f"held for the backward pass ({megabytes / first[1]:.1f} times)",
               f"loss B 8 N {N}", {"ms": ms, "MB for the backward": megabytes})
    whole = min(train([], 2, device).ours)
    share = first[0] / 1000 / whole
    yield (f"N 512: {100 * share:.2f} % of a step of 8 clips of the paper's model ({whole:.2f} s)",
           "loss B 8 N 512", {"share of a step": share})


def saving(args):
    """The checkpoint of the paper's model, with momentum, written as support.run.Run writes it."""
    device = start()
    with tempfile.TemporaryDirectory() as out:
        settings = pretrain.parse(["--data", "made up", "--out", out])
        model, optimizer, scaler = pretrain.build(settings, device, torch.float32)
        for x in model.parameters():
            x.grad = torch.zeros_like(x)
        optimizer.step()
        loader = make_loader(AudioVisualClips(MADE_UP * 8), 8)
        run = Run(settings, loader, model, optimizer, scaler, {})
        spent, = turns([run.save], args.rounds, device)
        megabytes = run.path.stat().st_size / 1e6
    median, minutes = statistics.median(spent), settings.save_every
    share = median / minutes / 60
    yield (f"a checkpoint of {megabytes:.0f} MB holds training up for {median:.2f} s (at most "
           f"{max(spent):.2f}), {100 * share:.2f} % of the {minutes} minutes between two",
           "checkpoint of the full model", {
               "MB": megabytes, "s held up": median, "s held up, at most": max(spent),
               "share of the time between two": share})


def scaling(args):
    """clips/s of pretrain.py on two cores, on the built-in set in global batches of 32.

    One process of two threads has both cores, two processes of one thread share them, or two runs
    have one each. The last two are compared with the first. Each process loads its own clips, so
    the steps are compared without loading too. Two processes then still wait for the one that loads
    more slowly.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        sys.exit("error: this bench needs two cores")
    kinds = {"1 process": [(1, cores)], "2 processes": [(2, cores)],
             "2 runs": [(1, cores[:1]), (1, cores[1:])]}
    whole, steps = ({kind: [] for kind in kinds} for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        demo.build(Path(folder) / "demo")
        for n, (kind, runs) in product(range(args.rounds), kinds.items()):
            outs = [Path(folder) / f"{n}-{kind}-{k}" for k in range(len(runs))]
            started = [short_run(P, own, out) for (P, own), out in zip(runs, outs)]
            if any([process.wait() for process in started]):
                raise ValueError(f"pretrain.py failed: {kind}")
            logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()[2:]]
                    for out in outs]                                    # after the first steps
            whole[kind].append(sum(statistics.median(x["clips_per_s"] for x in log)
                                   for log in logs))
            steps[kind].append(sum(statistics.median(x["clips_per_s"] / (1 - x["wait"])
                                                     for x in log) for log in logs))
    for kind in list(kinds)[1:]:
        (over, text), (alone, text_alone) = (ratio(x[kind], x["1 process"]) for x in (whole, steps))
        yield (f"{kind} / 1 process: {text}; without loading {text_alone}", "scaling",
               {f"{kind} / 1 process": over, f"{kind} / 1 process, without loading": alone})


def short_run(P, cores, out):
    """Start pretrain.py with P processes on these cores, for 2 epochs of the built-in set."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={P}",
         "pretrain.py", "--out", str(out), "--epochs", "2", "--batch-per-process", str(32 // P),
         "--workers", "0"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        preexec_fn=lambda: os.sched_setaffinity(0, cores))


def retrieval(args):
    device = start()
    for n in (1000, 8000, 32000):
        query, gallery = (F.normalize(torch.randn(n, 256, device=device), dim=1) for _ in range(2))
        labels = torch.arange(n, device=device) % 32
        spent, = turns([lambda: ranks(query, gallery, labels)], args.rounds, device)
        yield (f"pool of {n}: {min(spent):.3f} s for the ranks of one direction",
               f"retrieval n {n}", {"s": min(spent)})


def hardware():
    """Number and kind of the cores, the GPU if there is one, and versions."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in info if "model name" in line]
    text = (f"{len(os.sched_getaffinity(0))} core(s) of {names[0] if names else platform.machine()}"
            f", torch {torch.__version__}, av {av.__version__}")
    if torch.cuda.is_available():
        text += f", {torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}"
    return text


def record(path, what, values):
    """Add a line for each of the values {quantity: value} to a csv."""
    command = " ".join([f"python -m experiments.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    about = [time.strftime("%Y-%m-%d"), hardware(), command, what]
    lines = [[*about, name, f"{value:.4g}"] for name, value in values.items()]
    if not Path(path).exists():
        lines.insert(0, ["date", "hardware", "command", "what", "quantity", "value"])
    with open(path, "a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


BENCHES = {"step": step, "loss": loss, "saving": saving, "scaling": scaling,
           "retrieval": retrieval, "loader": bench_data.loader, "rows": bench_data.rows,
           "scan": bench_data.scan, "frames": bench_data.frames}


def main():
    """Run the command."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("what", choices=list(BENCHES))
    p.add_argument("--rounds", type=int,
                   help="measured rounds (15; saving 7, scaling 3, retrieval 2)")
    p.add_argument("--csv", help="file to add the results to (none)")
    p.add_argument("--arch", default="r2plus1d_10", help="step: video encoder (r2plus1d_10)")
    p.add_argument("--batch-size", type=int, nargs="+", default=[32],
                   help="step: clips, one or more sizes, the smallest first (32)")
    p.add_argument("--chunk", type=int, help="step: beside it the same batch in chunks of so many "
                   "clips, and a batch of one chunk (none)")
    p.add_argument("--frames", type=int, default=4, help="step: T (4)")
    p.add_argument("--size", type=int, default=32, help="step: H = W in pixels (32)")
    p.add_argument("--compile", action="store_true", help="step: torch.compile (off)")
    p.add_argument("--profile", action="store_true", help="step: where the time goes (off)")
    args = p.parse_args()
    args.rounds = args.rounds or {"saving": 7, "scaling": 3, "retrieval": 2}.get(args.what, 15)
    if args.rounds < 2:
        p.error(f"--rounds {args.rounds}: quartiles need 2 or more")
    for B in args.batch_size if args.chunk is not None else ():
        if args.chunk < 2 or B <= args.chunk or B % args.chunk:
            p.error(f"--chunk {args.chunk}: give 2 or more clips, fewer than the batch of {B}, "
                    "that divide it")
    print(hardware())
    for text, what, values in BENCHES[args.what](args):
        print(text, flush=True)
        if args.csv:
            record(args.csv, what, values)


if __name__ == "__main__":
    main()
