"""Real media for the tests, made with PyAV: the picture tells the time, the sound tells its pitch."""

import os
import shutil
import sys
from fractions import Fraction
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "passive"                 # many processes share these cores: none may wait busily

import av
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)

from experiments import frames                            # noqa: E402
from experiments.frames import barcode                    # noqa: E402
from prepare import scan                                  # noqa: E402


def read_barcode(video):
    """(..., H, W, 3) uint8 -> (...) the numbers, a tensor."""
    return torch.as_tensor(frames.read_barcode(video))


def make_video(path, seconds=6.0, fps=30, size=(72, 54), tone=400, rate=44100, layout="mono", codec="libx264",
               audio_codec="aac", gray=None, wave=None, start=0.0, gop=12, turned=0, ticks=None,
               sound_seconds=None, muxer=None):
    """One file. Each frame shows its number as a barcode unless gray(t) gives one gray value at time t (s); the sound
    is a tone (Hz) unless wave(t) gives samples. start: the first time stamp. tone=None: no sound track. turned:
    degrees by which a player is to turn the picture, counter-clockwise. ticks: stamps of the frames in 1/fps s.
    sound_seconds: length of the sound, if it is not that of the pictures. muxer: options of the container."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=muxer or {}) as out:
        options = {"g": str(gop), "crf": "5"} if codec == "libx264" else {}
        video = out.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), width=size[0], height=size[1],
                               pix_fmt="yuv420p", options=options)
        video.bit_rate = 2_000_000
        if turned:
            video.set_display_rotation(turned)
        audio = out.add_stream(audio_codec, rate=rate, layout=layout) if tone is not None else None
        offset = round(start * fps)
        for n in range(round(seconds * fps)):
            image = np.full((size[1], size[0], 3), gray(n / fps), np.uint8) if gray else barcode(n, size)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = (ticks[n] if ticks else n) + offset, 1 / Fraction(fps).limit_denominator(1001)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if audio is not None:
            t = np.arange(round((sound_seconds or seconds) * rate)) / rate
            sound = wave(t) if wave else 0.5 * np.sin(2 * np.pi * tone * t)
            channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
            planes = np.ascontiguousarray(np.tile(sound.astype(np.float32), (channels, 1)))
            resampler = av.AudioResampler(audio.format.name, layout, rate)      # to the format the encoder takes
            frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=layout)
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(start * rate)
            for part in resampler.resample(frame):
                out.mux(audio.encode(part))
            out.mux(audio.encode(None))
    return path


def with_damaged(rows, folder, chosen):
    """Two manifests of the rows: with the chosen files damaged since the scan, and without them."""
    scan.write([row for n, row in enumerate(rows) if n not in chosen], folder / "without.csv")
    for n in chosen:
        path = folder / f"bad{n}{Path(rows[n]['path']).suffix}"
        path.write_bytes(b"damaged since the scan")
        rows[n] = rows[n] | {"path": str(path)}
    scan.write(rows, folder / "with.csv")
    return folder / "with.csv", folder / "without.csv"


def peak_hz(wave, rate=24000):
    """The strongest frequency of a waveform, Hz."""
    wave = np.asarray(wave) * np.hanning(len(wave))
    return np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave)


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """ROOT/train/{low,high}/ 10 films, ROOT/test/... 24 films of 3 s, of two classes told apart by sight and sound."""
    root = tmp_path_factory.mktemp("tree")
    for split, many in (("train", 5), ("test", 12)):
        for label, tone, level in (("low", 300, 60), ("high", 900, 190)):
            for n in range(many):
                make_video(root / split / label / f"{n}.mp4", 3.0, 10, tone=tone + 20 * n, gray=lambda t: level + 3 * n)
    return root


@pytest.fixture(scope="session")
def brief(tree, tmp_path_factory):
    """The checkpoint.pt of one epoch on the tree's train part."""
    from test_pretrain import SMALL, run
    out = tmp_path_factory.mktemp("runs") / "brief"
    run("--data", tree, "--out", out, *SMALL, "--epochs", "1")
    return out / "checkpoint.pt"


# ---- for the tests of prepare/

@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """{kind: a film of 1 s} to be copied."""
    root = tmp_path_factory.mktemp("films")
    small = {"seconds": 1.0, "fps": 10, "size": (36, 28)}
    mpeg4 = small | {"codec": "mpeg4"}
    return {"mp4": make_video(root / "a.mp4", **small),
            "silent": make_video(root / "s.mp4", tone=None, **small),
            "avi": make_video(root / "a.avi", audio_codec="mp3", **mpeg4),
            "mkv": make_video(root / "a.mkv", audio_codec="ac3", **mpeg4)}


@pytest.fixture
def put(films, tmp_path):
    """put(path below tmp_path, kind of film) copies the film there and returns its path."""
    def copy(name, kind="mp4"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(films[kind], path))
    return copy


@pytest.fixture
def files_read(monkeypatch):
    """The names of the files that a scan reads, a list that grows."""
    names, in_workers = [], scan.in_workers

    def watched(work, items, workers, limit):
        names.extend(Path(item[0]).name for item in items)
        return in_workers(work, items, workers, limit)
    monkeypatch.setattr(scan, "in_workers", watched)
    return names


def write_text(path, content):
    """Write a text file, with the folders above it, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def by_name(rows, *columns):
    """{file name: values of these columns (default: label, split, reason)} of manifest rows."""
    columns = columns or ("label", "split", "reason")
    return {Path(row["path"]).name: tuple(row[name] for name in columns) for row in rows}
