"""Speed against the limit, on this machine. Ratios first: both sides of each are timed in turn, in one run.

    python -m experiments.bench step                  # training step against the bare encoders
    python -m experiments.bench loader [PATH ...]     # samples of both views at S = 4 against the bare decode, memory
    python -m experiments.bench scan [FOLDER]         # files/s of the scan with two processes

`loader` without paths makes 10 s films of 340 x 256 at 30 fps, H.264 and AAC, with a keyframe every 250 frames, and
reads their transcoded copies too; `scan` without a folder makes 400 short files.
"""

import argparse
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from augment import LogMel, crop_flip, normalize_frames
from data import RATE, AudioVisualClips, make_loader, read_clip, read_manifest
from prepare import demo, manifest, transcode
from pretrain import build, descend, objective, parse, precision, setup


def turns(functions, rounds, sync=lambda: None):
    """Time the functions in turn, `rounds` times after one unmeasured round: a list of s for each."""
    times = [[] for _ in functions]
    for r in range(rounds + 1):
        for spent, function in zip(times, functions):
            sync()
            began = time.perf_counter()
            function()
            sync()
            if r:
                spent.append(time.perf_counter() - began)
    return times


def ratio(ours, bare):
    """Median of the per-round ratios, and their quartiles."""
    r = [a / b for a, b in zip(ours, bare)]
    low, middle, high = statistics.quantiles(r, n=4)
    return f"{middle:.3f} (quartiles {low:.3f} to {high:.3f}, {len(r)} rounds)"


def step(args):
    device, _, _ = setup()
    dtype, why = precision(args.precision, device)
    B, K = args.batch_size, 2
    print(f"step: {args.arch}, B {B}, K {K}, T {args.frames}, {args.size} px, {str(dtype)[6:]} ({why}), "
          f"{torch.get_num_threads()} thread(s)")
    settings = parse(["--data", "unread", "--arch", args.arch])
    model, optimizer, scaler = build(settings, device, dtype)
    log_mel = LogMel().to(device)
    frames = torch.randint(0, 256, (B, K, args.frames, args.size, args.size, 3), dtype=torch.uint8)
    waves = torch.randn(B, K, RATE) * 0.1
    video = normalize_frames(frames.to(device)).flatten(0, 1)                       # (B K, 3, T, H, W)
    audio = log_mel(waves.to(device)).flatten(0, 1)                                 # (B K, 1, M, F)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def bare():
        with autocast:
            y_v, y_a = model.f(video), model.g(audio)
        (y_v.float().mean() + y_a.float().mean()).backward()
        model.zero_grad(set_to_none=True)

    def ours():                                           # what pretrain.py does with a batch
        loss, _, _ = objective(model, log_mel, frames.to(device), waves.to(device), settings, dtype)
        descend(loss, optimizer, scaler)

    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    spent = turns([ours, bare], args.rounds, sync)
    print(f"step / bare encoders: {ratio(*spent)}")
    print(f"step {min(spent[0]):.3f} s, {B / min(spent[0]):.1f} clips/s; bare {min(spent[1]):.3f} s")


def film(path, seconds=10, fps=30, rate=44100, size=(340, 256)):
    """A film with something to encode: moving texture, and noise under a tone."""
    rng = np.random.default_rng(0)
    width, height = size
    texture = rng.integers(0, 256, (64, 85, 3)).repeat(6, 0).repeat(6, 1).astype(np.uint8)     # (384, 510, 3)
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=fps, width=width, height=height, pix_fmt="yuv420p", options={"g": "250"})
        audio = out.add_stream("aac", rate=rate, layout="stereo")
        for n in range(seconds * fps):
            y, x = (int(60 + 50 * f(n / 25)) for f in (np.sin, np.cos))
            image = texture[y:y + height, x:x + width].astype(int) + rng.integers(-4, 5, (height, width, 1))
            out.mux(video.encode(av.VideoFrame.from_ndarray(np.clip(image, 0, 255).astype(np.uint8), format="rgb24")))
        out.mux(video.encode(None))
        t = np.arange(seconds * rate) / rate
        wave = (0.3 * np.sin(2 * np.pi * 440 * t) + 0.1 * rng.standard_normal((2, len(t)))).astype(np.float32)
        sound = av.AudioFrame.from_ndarray(wave, format="fltp", layout="stereo")
        sound.sample_rate, sound.pts, sound.time_base = rate, 0, Fraction(1, rate)
        out.mux(audio.encode(sound))
        out.mux(audio.encode(None))


def loader(args):
    """Sample: both views at speed 4, 30 frames at 30 fps, 128 px, 1 s of sound. Bare: decode the same 4 s, no more."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(path) for path in args.paths] or [Path(folder) / "set" / "films" / "film.mp4"]
        if not args.paths:
            paths[0].parent.mkdir(parents=True)
            film(paths[0])
        for path in paths:
            one_file(path, args.rounds)
        rows = manifest.probe_all([(path, "films", "", "") for path in paths])
        manifest.write(rows, Path(folder) / "m.csv")
        throughput("originals", Path(folder) / "m.csv", args.rounds)
        transcode.run(Path(folder) / "m.csv", Path(folder) / "copy")
        throughput("transcoded copies", Path(folder) / "copy" / "manifest.csv", args.rounds)
        memory(Path(folder) / "small", args.samples)


def throughput(name, path, rounds):
    """Samples/s of one loading process, as training draws them: speeds 1 to 4, place, crop and flip at random."""
    rows, _ = read_manifest(path)
    clips = AudioVisualClips(rows * (8 * (rounds + 2) // len(rows) + 8), 30, 30, 128, 4)
    batches = iter(make_loader(clips, 8, workers=1))
    next(batches)                                         # the process has started
    began = time.perf_counter()
    for _ in range(rounds):
        next(batches)
    print(f"{name}: {8 * rounds / (time.perf_counter() - began):.1f} samples/s with one worker")


def resident(process):
    """(resident, of that its own) memory of a process in MB."""
    fields = dict(line.split(":") for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:])
    kilobytes = {name: int(value.split()[0]) for name, value in fields.items()}
    return kilobytes["Rss"] / 1000, (kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]) / 1000


def memory(folder, samples):
    """Resident memory of two loading processes over `samples` samples of small films."""
    (folder / "train" / "bell").mkdir(parents=True)
    for n in range(16):
        demo.make_clip(folder, 0, ("train", "bell", n))
    manifest.write(manifest.scan(folder), folder / "m.csv")
    rows, _ = read_manifest(folder / "m.csv")
    clips = AudioVisualClips(rows * (samples // len(rows) + 1), 4, 4, 32, 4)
    marks = {}
    loader = make_loader(clips, 20, workers=2)
    iterator = iter(loader)
    for n, _ in enumerate(iterator, 1):
        if 20 * n in (1000, samples // 20 * 20):
            marks[20 * n] = [resident(child.pid) for child in multiprocessing.active_children()]
    sums = {n: [sum(pair[k] for pair in pairs) for k in (0, 1)] for n, pairs in marks.items()}
    first, last = min(sums), max(sums)
    print(f"memory of 2 workers: {sums[first][0]:.0f} MB after {first} samples, {sums[last][0]:.0f} MB after {last} "
          f"({100 * (sums[last][0] / sums[first][0] - 1):+.1f} %); their own {sums[first][1]:.0f} -> {sums[last][1]:.0f} MB")


def scan(args):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(args.paths[0]) if args.paths else Path(folder)
        if not args.paths:
            film(root / "0.mp4", seconds=1, size=(256, 256))
            for n in range(1, 400):
                shutil.copy(root / "0.mp4", root / f"{n}.mp4")
        for verify in (False, True):
            began = time.perf_counter()
            rows = manifest.scan(root, workers=2, verify=verify)
            print(f"scan{' --verify' * verify}: {len(rows) / (time.perf_counter() - began):.0f} files/s, "
                  f"{manifest.summary(rows)}")


def one_file(path, rounds):
    with av.open(str(path)) as container:
        seconds, video = container.duration / av.time_base, container.streams.video[0]
        print(f"loader: {Path(path).name}, {seconds:.1f} s, {video.width}x{video.height}, {float(video.average_rate):.2f} fps")
    starts = iter(np.random.default_rng(0).uniform(0, max(0, seconds - 4), rounds + 1).repeat(2))

    def ours():
        frames, wave = read_clip(path, next(starts), (1, 4), (1, 4), frames=30, fps=30, short_side=160)
        crop_flip(frames, 128).contiguous()

    def bare():
        t0 = next(starts)
        with av.open(str(path)) as container:
            video, audio = container.streams.video[0], container.streams.audio[0]
            video.codec_context.thread_count = 1
            container.seek(int(t0 * av.time_base))
            ends = {}
            for packet in container.demux(video, audio):
                for frame in packet.decode():
                    ends[packet.stream.type] = frame.time
                if len(ends) == 2 and min(ends.values()) >= t0 + 4:
                    break

    spent = turns([ours, bare], rounds)
    print(f"sample / bare decode of its window: {ratio(*spent)}")
    print(f"sample {1000 * statistics.median(spent[0]):.0f} ms, {1 / statistics.mean(spent[0]):.1f} samples/s on one core; "
          f"bare decode {1000 * statistics.median(spent[1]):.0f} ms")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("what", choices=["step", "loader", "scan"])
    p.add_argument("paths", nargs="*", help="loader: video files with sound; scan: a folder")
    p.add_argument("--arch", default="r2plus1d_10", help="step: video encoder (default r2plus1d_10)")
    p.add_argument("--batch-size", type=int, default=32, help="step: clips (default 32)")
    p.add_argument("--frames", type=int, default=4, help="step: T (default 4)")
    p.add_argument("--size", type=int, default=32, help="step: pixels (default 32)")
    p.add_argument("--precision", default="auto", help="step: auto, bf16, fp16 or fp32 (default auto)")
    p.add_argument("--rounds", type=int, default=15, help="measured rounds (default 15)")
    p.add_argument("--samples", type=int, default=10000, help="loader: samples over which memory is watched (default 10000)")
    args = p.parse_args()
    print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} core(s), torch {torch.__version__}, "
          f"av {av.__version__}" + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""))
    {"step": step, "loader": loader, "scan": scan}[args.what](args)
