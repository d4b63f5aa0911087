"""Speed against the limit, on this machine. Ratios first: both sides of each are timed in turn, in one run.

    python -m experiments.bench step                  # training step against the bare encoders, share of the matmul rate
    python -m experiments.bench loader [PATH ...]     # samples of both views at S = 4 against the bare decode, memory
    python -m experiments.bench scan [FOLDER]         # files/s of the scan with two processes
    python -m experiments.bench frames                # wrong frames, beside other libraries
    python -m experiments.bench loss                  # Eq. 3 at global batches of 512 to 32,768: time, memory, share of a step
    python -m experiments.bench retrieval             # ranks of pools of 1,000 to 32,000 clips
    python -m experiments.bench scaling               # 1 process with 2 threads against 2 processes with 1

The step of the paper's model on a GPU, batch after batch until its memory is full, and where the time goes:

    python -m experiments.bench step --arch r2plus1d_18 --frames 30 --size 128 --batch-size 8 16 32 64 128 256 --profile
    python -m experiments.bench step --arch r2plus1d_18 --frames 32 --size 224 --batch-size 8 16 32 64 --compile

`loader` without paths makes 10 s films of 340 x 256 at 30 fps, H.264 and AAC, with a keyframe every 250 frames, and
reads their transcoded copies too; `scan` without a folder makes 400 short files. --csv FILE adds what was measured to a csv.
"""

import argparse
import csv
import json
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from unittest.mock import patch

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from augment import LogMel, crop_flip, normalize_frames
from data import AudioVisualClips, make_loader, read_clip, read_manifest
from experiments import frames as films
from loss import soft_info_nce
from prepare import demo, scan as manifest, transcode
from pretrain import build, descend, objective, parse, precision, setup
from retrieval import ranks
from support.reading import RATE


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


def median_ratio(ours, bare):
    return statistics.median(a / b for a, b in zip(ours, bare))


def synchroniser(device):
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def hardware():
    """Cores and kind of the CPU or the GPU, and versions."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return (f"{len(os.sched_getaffinity(0))} core(s) of {names[0] if names else platform.machine()}, torch {torch.__version__}, "
            f"av {av.__version__}" + (f", {torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}"
                                         if torch.cuda.is_available() else ""))


def record(args, what, values):
    """Add a line per value to --csv: date, hardware, command, what, quantity, value."""
    if args.csv:
        new = not Path(args.csv).exists()
        with open(args.csv, "a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(["date", "hardware", "command", "what", "quantity", "value"])
            command = " ".join([f"python -m experiments.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
            about = [time.strftime("%Y-%m-%d"), hardware(), command, what]
            writer.writerows([*about, name, f"{value:.4g}"] for name, value in values.items())


def step(args):
    device, _, _ = setup()
    dtype, why = precision(args.precision, device)
    for B in args.batch_size:
        print(f"step: {args.arch}, B {B}, K 2, T {args.frames}, {args.size} px, {str(dtype)[6:]} ({why}), "
              f"{torch.get_num_threads()} thread(s){', compiled' * args.compile}")
        try:
            step_of(args, B, device, dtype)
        except RuntimeError as error:                     # cuDNN and cuBLAS name a full memory in other words
            if not isinstance(error, torch.OutOfMemoryError) and not re.search("unable to find an engine|ALLOC_FAILED", str(error)):
                raise
            print(f"B {B} does not fit the memory: {str(error).splitlines()[0]}")
            break


def step_of(args, B, device, dtype, K=2):
    """The step with B clips against the bare encoders."""
    if args.compile:
        torch.compiler.reset()                            # else the second B would compile for any B
    settings = parse(["--data", "unread", "--arch", args.arch, "--lr", "0.001"])    # whatever B is, weights stay finite
    model, optimizer, scaler = build(settings, device, dtype)
    net, f, g = (torch.compile(m) if args.compile else m for m in (model, model.f, model.g))
    log_mel, cuda, sync = LogMel().to(device), device.type == "cuda", synchroniser(device)
    frames = torch.randint(0, 256, (B, K, args.frames, args.size, args.size, 3), dtype=torch.uint8)
    waves = torch.randn(B, K, RATE) * 0.1
    frames, waves = (x.pin_memory() if cuda else x for x in (frames, waves))        # as make_loader gives them
    video = normalize_frames(frames.to(device)).flatten(0, 1)                       # (B K, 3, T, H, W)
    audio = log_mel(waves.to(device)).flatten(0, 1)                                 # (B K, 1, M, F)

    def bare():
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            y_v, y_a = f(video), g(audio)
        (y_v.float().mean() + y_a.float().mean()).backward()

    def ours():                                           # what pretrain.py does with a batch
        x, w = frames.to(device, non_blocking=True), waves.to(device, non_blocking=True)
        descend(objective(net, log_mel, x, w, settings, dtype)[0], optimizer, scaler)

    spent, values = turns([ours, bare], args.rounds, sync), {}
    if cuda:
        torch.cuda.empty_cache()                          # the search for the fastest convolutions took what was free
        torch.cuda.reset_peak_memory_stats()
        ours()
        values["peak memory, GB"] = torch.cuda.max_memory_allocated() / 1e9
    with FlopCounterMode(display=False) as counter:       # of 2 clips, so that it fits where the step does
        objective(model, log_mel, frames[:2].to(device), waves[:2].to(device), settings, dtype)[0].backward()
    size = 8192 if cuda else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    matmul, = turns([lambda: a @ b], args.rounds, sync)
    seconds, clips = min(spent[0]), B / min(spent[0])
    rate, peak = counter.get_total_flops() * B / 2 / seconds, 2 * size ** 3 / min(matmul)       # FLOP/s
    print(f"step / bare encoders: {ratio(*spent)}")
    print(f"step {seconds:.3f} s, {clips:.1f} clips/s; bare {min(spent[1]):.3f} s; {rate / 1e12:.2f} TFLOP/s, "
          f"{100 * rate / peak:.0f} % of the {peak / 1e12:.2f} of a {str(dtype)[6:]} matmul")
    values |= {"step / bare": median_ratio(*spent), "clips per s": clips, "share of matmul rate": rate / peak}
    if cuda:
        values["hours on 8 for 231k clips, 100 epochs"] = 231e5 / 8 / clips / 3600
        print("{peak memory, GB:.1f} GB; the paper's 231k clips x 100 epochs on 8 of these at this rate, nothing else counted: "
              "{hours on 8 for 231k clips, 100 epochs:.1f} h".format(**values))
    record(args, f"step {args.arch} B{B} T{args.frames} {args.size}px {str(dtype)[6:]}{' compiled' * args.compile}", values)
    if args.profile:
        profile(ours, device, sync)


def profile(function, device, sync):
    """The ten kernels (on a CPU: operations) that take most of a call's time, with their shares."""
    with torch.profiler.profile() as seen:
        function()
        sync()
    cuda = device.type == "cuda"
    events = [e for e in seen.key_averages() if not cuda or e.device_type != torch.autograd.DeviceType.CPU]
    spent = sorted(((e.self_device_time_total if cuda else e.self_cpu_time_total, e.key, e.count) for e in events
                    if not e.is_user_annotation), reverse=True)
    for time_, name, count in spent[:10]:
        print(f"{100 * time_ / sum(t for t, _, _ in spent):5.1f} %  {count:4} x  {name[:100]}")


def loss(args):
    """Eq. 3 for B = 8 clips of one process against the N of all, which are made up in place of a gather's."""
    device, _, _ = setup()
    B, K, C, D, sync, first = 8, 2, 512, 256, synchroniser(device), None
    y_a, y_v = (torch.randn(B, K, C, device=device).relu().requires_grad_() for _ in range(2))
    z_a, z_v = (F.normalize(torch.randn(B, K, D, device=device), dim=2).requires_grad_() for _ in range(2))
    for N in (512, 2048, 8192, 32768):
        others = F.normalize(torch.randn(N - B, K, D, device=device), dim=2).requires_grad_()
        held = {}                                         # bytes of each storage that the backward needs

        def pack(x):
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        def both():
            with patch("loss.all_gather", lambda z: torch.cat([z, others])):                   # (N, K, D)
                L = soft_info_nce(y_a, y_v, z_a, z_v)
            torch.autograd.grad(L, [y_a, y_v, z_a, z_v, others])

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            both()
        megabytes, gathered = sum(held.values()) / 1e6, 2 * N * K * D * 4 / 1e6
        spent, = turns([both], args.rounds, sync)
        first = first or (min(spent), megabytes)
        print(f"N {N}: {1000 * min(spent):.2f} ms ({min(spent) / first[0]:.1f} times that of 512), {megabytes:.1f} MB held for "
              f"the backward ({megabytes / first[1]:.1f} times), {gathered:.1f} of them the gathered z; one N K x N K matrix "
              f"would be {(N * K) ** 2 * 4 / 1e6:.0f} MB")
        record(args, f"loss B 8 N {N}", {"ms": 1000 * min(spent), "MB for the backward": megabytes, "MB of gathered z": gathered})
        if N == 512:
            settings, model, optimizer, scaler, dtype = full_model(device)
            frames = torch.randint(0, 256, (B, K, 30, 128, 128, 3), dtype=torch.uint8, device=device)
            waves, log_mel = torch.randn(B, K, RATE, device=device) * 0.1, LogMel().to(device)
            whole, = turns([lambda: descend(objective(model, log_mel, frames, waves, settings, dtype)[0], optimizer, scaler)], 2, sync)
            print(f"N 512: {100 * min(spent) / min(whole):.2f} % of a step of 8 clips of the paper's model ({min(whole):.2f} s)")
            record(args, "loss B 8 N 512", {"share of a step": min(spent) / min(whole)})


def full_model(device):
    """The paper's settings: arguments, model, optimiser, scaler, autocast dtype."""
    settings, (dtype, _) = parse(["--data", "unread", "--lr", "0.001"]), precision("auto", device)
    return settings, *build(settings, device, dtype), dtype


def retrieval(args):
    device, _, _ = setup()
    for n in (1000, 8000, 32000):
        query, gallery = (F.normalize(torch.randn(n, 256, device=device), dim=1) for _ in range(2))
        labels = torch.arange(n, device=device) % 32
        spent, = turns([lambda: ranks(query, gallery, labels)], args.rounds, synchroniser(device))
        print(f"pool of {n}: {min(spent):.2f} s one way, instance and class level, {n * n / min(spent) / 1e6:.0f} million pairs/s")
        record(args, f"retrieval n {n}", {"s": min(spent)})


def scaling(args):
    """pretrain.py itself on the built-in set and two cores, a global batch of 32: clips/s from its log, in turn. Each
    process loads its own clips, which one process does on one of its two cores; so the steps alone are compared too,
    where two processes have to wait for the slower one's loading."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory() as folder:
        demo.build(Path(folder) / "demo")
        whole, steps = {1: [], 2: []}, {1: [], 2: []}
        for n in range(args.rounds):
            for processes in whole:
                out = Path(folder) / f"{n}-{processes}"
                subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                                "pretrain.py", "--out", str(out), "--epochs", "2", "--batch-size", str(32 // processes), "--workers",
                                "0"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
                lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()[2:]]     # past the first 10 steps
                whole[processes].append(statistics.median(line["clips_per_s"] for line in lines))
                steps[processes].append(statistics.median(line["clips_per_s"] / (1 - line["wait"]) for line in lines))
    print(f"2 processes / 1 process, the same two cores: {ratio(whole[2], whole[1])}; without loading {ratio(steps[2], steps[1])}")
    print(f"1 process {statistics.median(whole[1]):.1f} clips/s, 2 processes {statistics.median(whole[2]):.1f} clips/s")
    record(args, "scaling", {"2 processes / 1": median_ratio(whole[2], whole[1]), "without loading": median_ratio(steps[2], steps[1]),
                             "clips per s, 1": statistics.median(whole[1]), "clips per s, 2": statistics.median(whole[2])})


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
            one_file(args, path)
        rows = manifest.probe_all([(path, "films", "", "") for path in paths])
        manifest.write(rows, Path(folder) / "m.csv")
        throughput(args, "originals", Path(folder) / "m.csv")
        transcode.run(Path(folder) / "m.csv", Path(folder) / "copy")
        throughput(args, "transcoded copies", Path(folder) / "copy" / "manifest.csv")
        memory(args, Path(folder) / "small")


def throughput(args, name, path):
    """Samples/s of one loading process, as training draws them: speeds 1 to 4, place, crop and flip at random."""
    rows, _ = read_manifest(path)
    clips = AudioVisualClips(rows * (8 * (args.rounds + 2) // len(rows) + 8), 30, 30, 128, 4)
    batches = iter(make_loader(clips, 8, workers=1))
    next(batches)                                         # the process has started
    began = time.perf_counter()
    for _ in range(args.rounds):
        next(batches)
    rate = 8 * args.rounds / (time.perf_counter() - began)
    print(f"{name}: {rate:.1f} samples/s with one worker")
    record(args, f"loader {name}", {"samples per s, one worker": rate})


def resident(process):
    """(resident, of that its own) memory of a process in MB."""
    fields = dict(line.split(":") for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:])
    kilobytes = {name: int(value.split()[0]) for name, value in fields.items()}
    return kilobytes["Rss"] / 1000, (kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]) / 1000


def memory(args, folder):
    """Resident memory of two loading processes over --samples samples of small films."""
    (folder / "train" / "bell").mkdir(parents=True)
    for n in range(16):
        demo.make_clip(folder, 0, ("train", "bell", n))
    manifest.write(manifest.scan(folder), folder / "m.csv")
    rows, _ = read_manifest(folder / "m.csv")
    clips = AudioVisualClips(rows * (args.samples // len(rows) + 1), 4, 4, 32, 4)
    marks = {}
    loader = make_loader(clips, 20, workers=2)
    iterator = iter(loader)
    for n, _ in enumerate(iterator, 1):
        if 20 * n in (1000, args.samples // 20 * 20):
            marks[20 * n] = [resident(child.pid) for child in multiprocessing.active_children()]
    sums = {n: [sum(pair[k] for pair in pairs) for k in (0, 1)] for n, pairs in marks.items()}
    first, last = min(sums), max(sums)
    print(f"memory of 2 workers: {sums[first][0]:.0f} MB after {first} samples, {sums[last][0]:.0f} MB after {last} "
          f"({100 * (sums[last][0] / sums[first][0] - 1):+.1f} %); their own {sums[first][1]:.0f} -> {sums[last][1]:.0f} MB")
    record(args, f"loader, {last} samples", {"growth of memory since 1000": sums[last][0] / sums[first][0] - 1})


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
            rate = len(rows) / (time.perf_counter() - began)
            print(f"scan{' --verify' * verify}: {rate:.0f} files/s, {manifest.summary(rows)}")
            record(args, f"scan{' --verify' * verify}, 2 workers", {"files per s": rate})


def frames(args):
    """Wrong frames of 50 films, of this project's reader and of the libraries that are installed."""
    readers = {"ours": films.ours} | films.others()
    wrong = {name: [] for name in readers}
    with tempfile.TemporaryDirectory() as folder:
        for film in films.FILMS:
            path = films.make(film, Path(folder))
            known = films.truth(path)
            for name, reader in list(readers.items()):
                try:
                    count, asked = films.ask(path, reader, *known)
                except Exception as error:                # whatever a library raises
                    cause = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
                    print(f"{name}, {film.name}: {cause}", file=sys.stderr)
                    count = asked = films.PLACES * films.FRAMES     # none of its frames is right
                    if film is films.FILMS[0]:            # not even H.264 in mp4: it does not work here
                        del readers[name], wrong[name]
                        continue
                wrong[name].append(count)
            if film is films.FILMS[0]:
                print(f"{'frames wrong':26}" + "".join(f"{name:>12}" for name in wrong))
            counts = [counts[-1] for counts in wrong.values()]
            print(f"{film.name:26}" + "".join(f"{count:>12}" for count in counts), flush=True)
    total = asked * len(films.FILMS)
    for name, counts in wrong.items():
        bad = sum(count > 0 for count in counts)
        print(f"{name}: {sum(counts)} of {total} frames wrong, in {bad} of {len(counts)} films")
        values = {"wrong": sum(counts), "asked": total, "films with wrong frames": bad}
        record(args, f"frames, {name}", values)


def one_file(args, path):
    with av.open(str(path)) as container:
        seconds, video = container.duration / av.time_base, container.streams.video[0]
        print(f"loader: {Path(path).name}, {seconds:.1f} s, {video.width}x{video.height}, {float(video.average_rate):.2f} fps")
    starts = iter(np.random.default_rng(0).uniform(0, max(0, seconds - 4), args.rounds + 1).repeat(2))

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

    spent = turns([ours, bare], args.rounds)
    print(f"sample / bare decode of its window: {ratio(*spent)}")
    print(f"sample {1000 * statistics.median(spent[0]):.0f} ms, {1 / statistics.mean(spent[0]):.1f} samples/s on one core; "
          f"bare decode {1000 * statistics.median(spent[1]):.0f} ms")
    record(args, f"loader {Path(path).name}", {"sample / bare decode": median_ratio(*spent)})


BENCHES = {"step": step, "loader": loader, "frames": frames, "scan": scan, "loss": loss,
           "retrieval": retrieval, "scaling": scaling}

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("what", choices=list(BENCHES))
    p.add_argument("paths", nargs="*", help="loader: video files with sound; scan: a folder")
    p.add_argument("--arch", default="r2plus1d_10", help="step: video encoder (default r2plus1d_10)")
    p.add_argument("--batch-size", type=int, nargs="+", default=[32], help="step: clips, one or more sizes, the "
                   "smallest first (default 32)")
    p.add_argument("--frames", type=int, default=4, help="step: T (default 4)")
    p.add_argument("--size", type=int, default=32, help="step: pixels (default 32)")
    p.add_argument("--precision", default="auto", help="step: auto, bf16, fp16 or fp32 (default auto)")
    p.add_argument("--compile", action="store_true", help="step: torch.compile the model (default off)")
    p.add_argument("--profile", action="store_true", help="step: print where the time goes (default off)")
    p.add_argument("--csv", help="file to add the results to (default: none)")
    p.add_argument("--rounds", type=int, help="measured rounds (default 15; scaling 3, retrieval 2)")
    p.add_argument("--samples", type=int, default=10000, help="loader: samples over which memory is watched (default 10000)")
    args = p.parse_args()
    args.rounds = args.rounds or {"scaling": 3, "retrieval": 2}.get(args.what, 15)
    if args.rounds < 2:
        p.error(f"--rounds {args.rounds}: 2 or more, for quartiles")
    print(hardware())
    BENCHES[args.what](args)
