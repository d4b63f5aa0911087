"""The benches of experiments/bench.py that read files: loader, rows, scan, frames."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from augment import random_crop
from data import AudioVisualClips, make_loader, read_clip, read_manifest
from experiments import frames as films
from experiments.timing import ratio, turns
from prepare import demo, scan as manifest, transcode
from support.processes import start

ROOT = Path(__file__).parent.parent

def film(path, seconds=10, size=(340, 256)):
    """Write moving texture at 30 fps and a noisy tone: H.264, a keyframe every 250 frames; AAC."""
    rng, (width, height) = np.random.default_rng(0), size
    texture = rng.integers(0, 256, (64, 85, 3)).repeat(6, 0).repeat(6, 1)           # (384, 510, 3)
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=30, width=width, height=height, pix_fmt="yuv420p",
                               options={"g": "250"})
        audio = out.add_stream("aac", rate=44100, layout="stereo")
        for n in range(seconds * 30):
            y, x = (int(60 + 50 * f(n / 25)) for f in (np.sin, np.cos))
            image = texture[y:y + height, x:x + width] + rng.integers(-4, 5, (height, width, 1))
            image = np.clip(image, 0, 255).astype(np.uint8)
            out.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(video.encode(None))
        t = np.arange(seconds * 44100) / 44100
        wave = 0.3 * np.sin(2 * np.pi * 440 * t) + 0.1 * rng.standard_normal((2, len(t)))
        sound = av.AudioFrame.from_ndarray(wave.astype(np.float32), format="fltp", layout="stereo")
        sound.sample_rate, sound.pts, sound.time_base = 44100, 0, Fraction(1, 44100)
        out.mux(audio.encode(sound))
        out.mux(audio.encode(None))


def loader(args):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path, listed = Path(folder) / "set" / "films" / "film.mp4", Path(folder) / "m.csv"
        path.parent.mkdir(parents=True)
        film(path)
        yield sample(path, args.rounds)
        manifest.write(manifest.scan(path.parent.parent), listed)
        yield throughput("originals", listed, args.rounds)
        transcode.run(listed, Path(folder) / "copy")
        copies = Path(folder) / "copy" / "manifest.csv"
        yield throughput("transcoded copies", copies, args.rounds)
        yield memory(Path(folder) / "small")


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

    over, text = ratio(*turns([ours, bare], rounds))
    return (f"sample / bare decode of its window: {text}", f"loader {path.name}",
            {"sample / bare decode": over})


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
    return (f"{name}: {rate:.1f} samples/s with one worker", f"loader {name}",
            {"samples per s, one worker": rate})


def memory(folder):
    """Memory of two loading processes after 1,000 and after 10,000 samples of small films."""
    (folder / "train" / "bell").mkdir(parents=True)
    for n in range(16):
        demo.make_clip(folder, 0, ("train", "bell", n))
    manifest.write(manifest.scan(folder), folder / "m.csv")
    rows, _ = read_manifest(folder / "m.csv")
    dataset, megabytes = AudioVisualClips(rows * 626, 4, 4, 32, 4), {}
    for n, _ in enumerate(make_loader(dataset, 20, workers=2), 1):
        if 20 * n in (1000, 10000):
            megabytes[20 * n] = sum(memory_of_workers("Rss"))
    growth = megabytes[10000] / megabytes[1000] - 1
    return (f"memory of 2 workers: {megabytes[1000]:.0f} MB after 1000 samples, "
            f"{megabytes[10000]:.0f} MB after 10000 ({100 * growth:+.1f} %)",
            "loader, 10000 samples", {"growth of memory since 1000": growth})


def memory_of_workers(kind):
    """MB of each loading process: "Rss", all of it | "Pss", with its share of what is shared."""
    texts = [Path(f"/proc/{child.pid}/smaps_rollup").read_text()
             for child in multiprocessing.active_children()]
    return [int(line.split()[1]) / 1000 for text in texts for line in text.splitlines()
            if line.startswith(f"{kind}:")]


def rows(args):
    """A manifest of 240,000 rows beside one of 1,000, for each way to start loading processes."""
    script = "from experiments.bench_data import start_up\nif __name__ == '__main__': start_up()\n"
    with tempfile.TemporaryDirectory() as folder:
        make_rows(Path(folder))
        (Path(folder) / "start_up.py").write_text(script)
        for method in ("fork", "forkserver", "spawn"):
            done = subprocess.run(
                [sys.executable, "start_up.py", method], cwd=folder, check=True, text=True,
                stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
            seconds, few, many = map(float, done.stdout.split())
            yield (f"{method}: the first batch comes {seconds:.1f} s after reading 240,000 rows "
                   f"began; each of 2 workers has {many:.0f} MB, with 1,000 rows {few:.0f} MB",
                   f"240,000 rows, {method}", {"s to the first batch": seconds,
                                               "MB more of a worker": many - few})


def make_rows(folder):
    """Write 240000.csv and 1000.csv, whose rows are links to one film."""
    (folder / "train" / "bell").mkdir(parents=True)
    demo.make_clip(folder, 0, ("train", "bell", 0))
    row = manifest.probe((folder / "train" / "bell" / "000.mp4", "", "train"))
    paths = [folder / f"abcdefghijk_{n:06}_{n:06}.mp4" for n in range(240000)]
    for path in paths:
        path.symlink_to(row["path"])
    rows = [row | {"path": str(path), "label": f"playing the instrument {n % 400}"}
            for n, path in enumerate(paths)]
    manifest.write(rows[:1000], folder / "1000.csv")
    manifest.write(rows, folder / "240000.csv")


def start_up():
    """Print the s to the first batch with 240,000 rows, and the MB of a worker with 1,000 and with
    240,000 rows, after 800 and 2,000 samples."""
    multiprocessing.set_start_method(sys.argv[1])
    start()
    megabytes = []
    for many, batch in ((1000, 40), (240000, 100)):
        began = time.perf_counter()
        listed, _ = read_manifest(f"{many}.csv")
        batches = iter(make_loader(AudioVisualClips(listed, 4, 4, 16, 4), 20, workers=2))
        next(batches)
        seconds = time.perf_counter() - began
        for _ in range(batch):
            next(batches)
        megabytes.append(max(memory_of_workers("Pss")))
        del batches
    print(seconds, *megabytes)


def scan(args):
    with tempfile.TemporaryDirectory() as folder:
        film(Path(folder) / "0.mp4", seconds=1, size=(256, 256))
        for n in range(1, 400):
            shutil.copy(Path(folder) / "0.mp4", Path(folder) / f"{n}.mp4")
        for verify in (False, True):
            began = time.perf_counter()
            rows = manifest.scan(folder, workers=2, verify=verify)
            rate, name = len(rows) / (time.perf_counter() - began), f"scan{' --verify' * verify}"
            yield (f"{name}: {rate:.0f} files/s, {manifest.summary(rows)}", f"{name}, 2 workers",
                   {"files per s": rate})


def frames(args):
    """Wrong frames of 50 films: of this reader, and of the libraries that are installed."""
    readers = {"ours": films.ours} | films.others()
    wrong, asked = {name: [] for name in readers}, films.PLACES * films.FRAMES
    with tempfile.TemporaryDirectory() as folder:
        for film in films.FILMS:
            path = films.make(film, Path(folder))
            known = films.truth(path)
            for name, reader in list(readers.items()):
                try:
                    count, _ = films.ask(path, reader, *known)
                except Exception as error:          # whatever a library raises
                    cause = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
                    print(f"{name}, {film.name}: {cause}", file=sys.stderr)
                    count = asked                   # none of its frames is right
                    if film is films.FILMS[0]:      # it cannot even read H.264 in mp4
                        del readers[name], wrong[name]
                        continue
                wrong[name].append(count)
            if film is films.FILMS[0]:
                print(f"{'frames wrong':26}" + "".join(f"{name:>12}" for name in wrong))
            counts = [counts[-1] for counts in wrong.values()]
            print(f"{film.name:26}" + "".join(f"{count:>12}" for count in counts), flush=True)
    for name, counts in wrong.items():
        number, total, bad = sum(counts), asked * len(counts), sum(n > 0 for n in counts)
        yield (f"{name}: {number} of {total} frames wrong, in {bad} of {len(counts)} films",
               f"frames, {name}",
               {"wrong": number, "asked": total, "films with wrong frames": bad})
