"""Speed against what the hardware allows. Ratios come first: both sides are timed in turn.

    python -m experiments.bench step            # a training step over the bare encoders
    python -m experiments.bench step --batch-size 64 --chunk 8      # and in chunks of 8 clips
    python -m experiments.bench memory --batch-size 8 --precision fp16      # needs no GPU
    python -m experiments.bench loss            # Eq. 3 at global batches of 512 to 32,768
    python -m experiments.bench loader          # a sample over the bare decode of its window

`step --batch-size 8 16 32 ...` goes on until the memory is full. Each bench yields what it measured
with its {quantity: value}. They are printed, and `--csv FILE` adds a line to FILE for each value.
"""

import argparse
import csv
import io
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from fractions import Fraction
from pathlib import Path
from unittest.mock import patch

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import pretrain
from augment import LogMel, normalize_frames, random_crop
from data import AudioVisualClips, make_loader, read_clip, read_manifest
from loss import soft_info_nce
from prepare import scan, transcode
from prepare.scan import Row
from support.processes import at_least, autocast, choose_precision, start
from support.reading import RATE


def now(device):
    """The time in s, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def turns(functions, rounds, device=torch.device("cpu")):
    """Time functions in turn, in `rounds` rounds after one that is not counted: s, a list each.

    A machine that slows down slows all of them down.
    """
    times = [[] for _ in functions]
    for n in range(rounds + 1):
        for spent, function in zip(times, functions):
            began = now(device)
            function()
            if n:
                spent.append(now(device) - began)
    return times


def ratio(name, ours, bare):
    """{quantity: value}: the median of the ratios of the rounds, and their quartiles."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(ours, bare)], n=4)
    return {name: middle, f"{name}, first quartile": low, f"{name}, third quartile": high}


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
    device = start()
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
            except RuntimeError as error:   # cuDNN and cuBLAS name a full memory in other words
                full = re.search("unable to find an engine|ALLOC_FAILED", str(error))
                if not full and not isinstance(error, torch.OutOfMemoryError):
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
    matmul, = turns([lambda: a @ b], steps.rounds, steps.device)
    rate, limit = steps.flops / min(steps.ours), 2 * size ** 3 / min(matmul)        # FLOP/s
    what = f"step {args.arch} B{B} T{args.frames} {args.size}px {dtype}"
    what += f" chunks of {args.chunk}" if args.chunk else ""
    what += " compiled" if args.compile else ""
    # Beside --chunk the bare encoders take chunks, also where the step does not.
    over = "step / bare in chunks" if steps.chunk else "step / bare"
    values = ratio(over, steps.ours, steps.bare) | {
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


@contextmanager
def held_for_backward():
    """Yield {storage: its bytes}, which gets each storage that the backward pass will need."""
    held = {}

    def keep(x):
        storage = x.untyped_storage()
        held[storage._cdata] = storage.nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        yield held


def memory(args):
    """The bytes of a step of pretrain.py, counted on fake tensors, which have no values.

    A chunk is embedded as a batch of its size, beside the frames of the whole batch. What
    convolutions take for their work, and what an allocator leaves unused, is not counted.
    """
    cpu, (dtype, _) = torch.device("cpu"), choose_precision(args.precision, start())
    T, size, fake = args.frames, args.size, FakeTensorMode()
    flags = pretrain.parse(["--data", "made up", "--arch", args.arch])
    model, _, _ = pretrain.build(flags, cpu, dtype)
    with FakeCopyMode(fake):
        model, log_mel = deepcopy((model, LogMel()))
    for B in args.batch_size:
        c = args.chunk or B                                                     # clips at a time
        with fake, FlopCounterMode(display=False) as counter, held_for_backward() as held:
            frames = torch.empty(B, 2, T, size, size, 3, dtype=torch.uint8)
            waves = torch.empty(B, 2, RATE)                             # 1 s of sound
            audio, video = log_mel(waves[:c]), normalize_frames(frames[:c])
            with autocast(cpu, dtype):
                outputs = model(audio, video)
            L = soft_info_nce(*outputs, check=False)
            # A chunk is first embedded without gradient.
            flops = counter.get_total_flops() if args.chunk else 0
            L.backward()
        inputs, state = [frames, waves, audio, video], list(model.state_dict().values())
        counted = {x.untyped_storage()._cdata for x in inputs + state}
        parts = {"held for backward": sum(n for s, n in held.items() if s not in counted),
                 "weights": sum(x.nbytes for x in state),
                 "gradients": sum(x.nbytes for x in model.parameters()),
                 "momentum": sum(x.nbytes for x in model.parameters()),
                 "frames and sound": sum(x.nbytes for x in inputs)}
        parts = {"needed": sum(parts.values())} | parts
        chunks = f" chunks of {c}" if args.chunk else ""
        yield f"memory {args.arch} B{B} T{T} {size}px {str(dtype)[6:]}{chunks}", {
            **{f"{name}, GB": n / 1e9 for name, n in parts.items()},
            "TFLOP of a clip": (flops + counter.get_total_flops()) / c / 1e12}


def loss(args):
    device, first = start(), None
    B, K, C, D = 8, 2, 512, 256
    y_a, y_v = (torch.randn(B, K, C, device=device).relu().requires_grad_() for _ in range(2))
    z_a, z_v = (F.normalize(torch.randn(B, K, D, device=device), dim=2).requires_grad_()
                for _ in range(2))
    for N in (512, 2048, 8192, 32768):
        others = F.normalize(torch.randn(N - B, K, D, device=device), dim=2).requires_grad_()
        def both():                         # the clips of the other processes are made up
            with patch("loss.all_gather", lambda z: torch.cat([z, others])):    # (N, K, D)
                L = soft_info_nce(y_a, y_v, z_a, z_v, check=False)      # as in pretrain.py
            torch.autograd.grad(L, [y_a, y_v, z_a, z_v, others])

        with held_for_backward() as held:
            both()
        spent, = turns([both], args.rounds, device)
        values = {"ms": 1000 * min(spent), "MB for the backward": sum(held.values()) / 1e6}
        first = first or values
        over = {f"{name} / N 512": value / first[name] for name, value in values.items()}
        yield f"loss B 8 N {N}", values | over
    # Of 8 clips of the paper's model.
    yield "loss B 8 N 512", {"share of a step": first["ms"] / 1000 / min(train([], 2, device).ours)}


def loader(args):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, listed = folder / "set" / "films" / "film.mp4", folder / "m.csv"
        path.parent.mkdir(parents=True)
        film(path)
        yield sample(path, args.rounds)
        scan.write(scan.scan(path.parent.parent), listed)
        transcode.run(listed, folder / "copy")
        yield throughput("originals", listed, args.rounds)
        yield throughput("transcoded copies", folder / "copy" / "manifest.csv", args.rounds)


def film(path):
    """Write 10 s of moving texture at 30 fps and a noisy tone: H.264, a keyframe every 250 frames;
    AAC."""
    rng, rate = np.random.default_rng(0), 44100
    texture = rng.integers(0, 256, (64, 85, 3)).repeat(6, 0).repeat(6, 1)           # (384, 510, 3)
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=30, width=340, height=256, options={"g": "250"})
        audio = out.add_stream("aac", rate=rate)
        for n in range(300):
            y, x = (int(60 + 50 * f(n / 25)) for f in (np.sin, np.cos))
            image = texture[y:y + 256, x:x + 340] + rng.integers(-4, 5, (256, 340, 1))
            image = np.clip(image, 0, 255).astype(np.uint8)
            out.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(video.encode(None))
        t = np.arange(10 * rate) / rate
        wave = 0.3 * np.sin(2 * np.pi * 440 * t) + 0.1 * rng.standard_normal((2, len(t)))
        sound = av.AudioFrame.from_ndarray(wave.astype(np.float32), format="fltp", layout="stereo")
        sound.sample_rate, sound.pts, sound.time_base = rate, 0, Fraction(1, rate)
        out.mux(audio.encode(sound))
        out.mux(audio.encode(None))


def sample(path, rounds):
    """Both views at speed 4 (30 frames at 30 fps, 128 pixels, 1 s of sound) from places of a film
    of 10 s, over the bare decode of the same 4 s."""
    starts = iter(np.random.default_rng(0).uniform(0, 6, rounds + 1).repeat(2))

    def ours():
        window, mirrored = random_crop()
        video, _ = read_clip(path, next(starts), (1, 4), (1, 4), 30, 30, 128, window)
        video.flip(-2) if mirrored else video

    def bare():
        t0, times = next(starts), {}
        with av.open(str(path)) as container:
            video, audio = container.streams.video[0], container.streams.audio[0]
            video.codec_context.thread_count = 1
            container.seek(int(t0 * av.time_base))
            for packet in container.demux(video, audio):
                times |= {packet.stream.type: frame.time for frame in packet.decode()}
                if len(times) == 2 and min(times.values()) >= t0 + 4:
                    break

    return f"loader {path.name}", ratio("sample / bare decode", *turns([ours, bare], rounds))


def throughput(name, listed, rounds):
    """Samples/s of one loading process as training draws them: speeds 1 to 4, any place."""
    rows, _ = read_manifest(listed)
    dataset = AudioVisualClips(rows * (8 * (rounds + 4)), 30, 30, 128, 4)
    batches = iter(make_loader(dataset, 8, workers=1))
    next(batches)                           # by then the process has started
    began = time.perf_counter()
    for _ in range(rounds):
        next(batches)
    rate = 8 * rounds / (time.perf_counter() - began)
    return f"loader {name}", {"samples per s, one worker": rate}


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
    benches = {"step": step, "memory": memory, "loss": loss, "loader": loader}
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("what", choices=list(benches))
    p.add_argument("--rounds", type=at_least(2), default=15, help="measured rounds (15)")
    p.add_argument("--csv", help="file to add the results to (none)")
    p.add_argument("--arch", default="r2plus1d_10",
                   help="step, memory: video encoder (r2plus1d_10)")
    p.add_argument("--batch-size", type=int, nargs="+", default=[32],
                   help="step, memory: clips, one or more sizes, the smallest first (32)")
    p.add_argument("--chunk", type=at_least(2),
                   help="memory: embed so many clips at a time; step: beside it the same batch in "
                   "such chunks, and a batch of one chunk (none)")
    p.add_argument("--frames", type=int, default=4, help="step, memory: T (4)")
    p.add_argument("--size", type=int, default=32, help="step, memory: H = W in pixels (32)")
    p.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
                   help="step, memory: of the encoders (auto)")
    p.add_argument("--compile", action="store_true", help="step: torch.compile (off)")
    p.add_argument("--profile", action="store_true", help="step: where the time goes (off)")
    args = p.parse_args()
    if any(B % (args.chunk or B) for B in args.batch_size):
        p.error(f"--chunk {args.chunk} does not divide every --batch-size")
    print(hardware())
    for what, values in benches[args.what](args):
        print(what, *(f"    {name}: {value:.4g}" for name, value in values.items()), sep="\n",
              flush=True)
        if args.csv:
            record(args.csv, what, values)


if __name__ == "__main__":
    main()
