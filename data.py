"""The data (§3.1): manifest row -> one container, one decode pass -> views of a clip -> batches.

    rows, left_out = read_manifest("manifest.csv")          # python -m prepare.manifest makes it
    dataset = AudioVisualClips(rows, frames=30, fps=30, size=128, max_speed=4)
    for video, audio, sources in make_loader(dataset, batch_size=8):
        ...                         # video (B, K, T, H, W, 3) uint8, audio (B, K, L) float32

A view at speed tau covers tau times the source in the same number of frames and samples (§2.1):

    source       t0 |-------------|-------------|-------------|-------------|   T / fps seconds each
    view 0          |x x x x x x x|
    view 1, tau = 3 |x     x     x     x     x     x     x     |

Symbols: B clips, K views, T frames, H, W pixels, L samples.
"""

import atexit
import os
from pathlib import Path

import av
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from augment import (centre_band, centre_crop, crop_at, flip_jitter, frame_times, random_crop,
                     random_resized_crop, sample_speeds, speed_up_audio)
from prepare import demo, scan
from support.batches import TrainingBatches, collate, draw_or_replace, read_or_name
from support.processes import (cores_per_process, end_with_trainer, end_workers, rank, run_once,
                               say, world_size)
from support.reading import RATE, read
from support.rows import make_row, read_rows, segment_name


def read_manifest(path, split=None):
    """Read the usable rows of a manifest.csv, and the others as {name: reason}.

    split: the part to read, None for all. A manifest without parts is read whole. A row is a Row of
    support/rows.py. Raises ValueError if the file is no manifest or has no such part.
    """
    path = Path(path)
    table = read_rows(path)
    if not table:
        raise ValueError(f"{path} has no rows: make it anew with python -m prepare.manifest")
    splits = sorted({line["split"] for line in table})
    if split is not None and splits != [""]:
        if split not in splits:
            raise ValueError(f"{path} has no {split!r} part, it has "
                             f"{', '.join(map(repr, splits))}: give other data, or name one of "
                             "these parts with --split")
        table = [line for line in table if line["split"] == split]
    rows, left_out = [], {}
    for line in table:
        try:
            if line["reason"]:
                raise ValueError(line["reason"])
            rows.append(make_row(line))
        except ValueError as error:
            name = segment_name(line["path"], line["start"], line["end"])
            left_out[name] = str(error)
    return rows, left_out


def find_rows(data, split, out):
    """Find the rows of one part of a data set, as `read_manifest` returns them.

    data: manifest.csv | a folder, which process 0 scans | None: the built-in set, which process 0
    makes beside `out` if it is missing. out: folder for the manifest.csv of a scan; a later scan
    reads only changed files. Raises ValueError on all processes if the data cannot be found.
    """
    source = Path(data or Path(out).parent / "demo")
    if source.suffix == ".csv":
        if not source.exists():
            raise ValueError(f"--data {source}: no such manifest")
        return read_manifest(source, split)
    manifest, cores = Path(out) / "manifest.csv", len(os.sched_getaffinity(0))

    def scan_folder():
        _, notes = scan.survey("folder", source, cores, out=manifest)
        for note in notes if data else ():
            say(note)

    try:
        if data is None:
            run_once(lambda: demo.build(source))
        run_once(scan_folder)
    except ValueError as error:
        raise ValueError(f"--data {source}: {error}") from None
    return read_manifest(manifest, split)


def read_clip(path, t0, tau_v=(1,), tau_a=(1,), frames=30, fps=30, size=160, window=None,
              stop=None):
    """Read all views of one clip, which covers [t0, t0 + max(tau) * frames / fps) of the file.

    Args:
        t0: start in s after the pictures begin or, if sound is read, after both have begun. The
            frame of a time is the one with the nearest time stamp. Past the end of the file the
            last frame is repeated and the sound is silent.
        tau_v, tau_a: speeds of the video and audio views, integers >= 1. tau_a = () reads no sound.
        frames, fps: T frames, 1/fps s apart at speed 1. The sound of a view lasts T / fps s.
        size: of the frames, a pair (H, W) or the shorter side alone, which keeps the aspect.
        window: the part of the picture that is read, see augment.py; None for all of it.
        stop: the end of a segment in s, where the clip ends as if the file did; None: no segment.
    Returns:
        video (K, T, H, W, 3) uint8, audio (K, L) float32 at 24 kHz, L = 24000 frames / fps. Raises
        ValueError with the path and the cause if the file cannot give them.
    """
    times = torch.stack([frame_times(frames, fps, tau) for tau in tau_v])       # (K, T) s after t0
    times, index = times.unique(return_inverse=True)                            # (n,), (K, T)
    times = t0 + times.double()
    L = round(RATE * frames / fps)
    if stop is not None:                                # no frame is later than 1/fps before stop
        times = times.clamp(max=max(t0, stop - 1 / fps))
    try:
        images, wave = read(path, times.tolist(), max(tau_a, default=0) * L, size, window)
    except (av.error.FFmpegError, OSError, OverflowError, ValueError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if stop is not None:
        wave[max(0, round((stop - t0) * RATE)):] = 0
    views = np.stack([images[n] for n in index.flatten().tolist()])             # (K T, H, W, 3)
    video = torch.from_numpy(views).unflatten(0, index.shape)                   # (K, T, H, W, 3)
    audio = [speed_up_audio(torch.from_numpy(wave[:tau * L]), tau) for tau in tau_a]
    return video, torch.stack(audio) if audio else torch.empty(0, L)            # (K, L)


class AudioVisualClips(Dataset):
    """The co-augmented views of a clip to train on, or evenly spaced clips at speed 1 to evaluate.

    Args:
        rows: from read_manifest. The dict `left_out` gets {name: reason} of those without sound or
            shorter than one clip.
        frames, fps, size: T frames, 1/fps s apart, size x size pixels.
        max_speed: S of §2.1. A file too short for S draws from the speeds that fit it.
        same_speed: True: video and sound share one drawn speed | False: independent ones.
        seed: every draw (place, speeds, scale, crop, flip) depends on (seed, epoch, index) alone.
        clips_per_file: None to train | n to evaluate on n evenly spaced clips with a centre crop.
    Items: to train, of a key (epoch, index), see `draw`; to evaluate, of a key index, see `read`. A
        third value tells what failed, see support/batches.py.
    """

    def __init__(self, rows, frames=30, fps=30, size=128, max_speed=4, same_speed=False, seed=0,
                 clips_per_file=None):
        self.frames, self.fps, self.size, self.seed = frames, fps, size, seed
        self.max_speed, self.same_speed, self.clips_per_file = max_speed, same_speed, clips_per_file
        self.seconds = frames / fps
        self.K = 1 if max_speed == 1 else 2             # one view without co-augmentation
        self.rows, self.left_out = [], {}
        for row in rows:
            if not row.has_audio:
                self.left_out[row.name] = row.note or "no audio stream"
            elif row.duration < self.seconds - 0.5 / fps:
                self.left_out[row.name] = f"shorter than one clip of {self.seconds:.2f} s"
            else:
                self.rows.append(row)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        if self.clips_per_file is None:
            return draw_or_replace(self, *key)
        return read_or_name(self, key)

    def read(self, row):
        """The evaluation clips of a file: video (n, T, H, W, 3) uint8, audio (n, L) float32."""
        return evenly_spaced(self, row.path, row.duration, row.start, row.stop,
                             sound=row.has_audio)

    def fitting_speed(self, row):
        """The highest speed up to S at which a clip fits the file."""
        return min(self.max_speed, max(1, int(row.duration / self.seconds + 1e-3)))

    def draw(self, row, generator):
        """The views of one training clip: video (K, T, H, W, 3) uint8, audio (K, L) float32."""
        S = self.fitting_speed(row)
        tau_v, tau_a = (tau[:self.K] for tau in sample_speeds(S, generator, self.same_speed))
        room = row.duration - max(tau_v + tau_a) * self.seconds
        t0 = row.start + max(0, room) * float(torch.rand((), generator=generator))
        window, mirrored = random_crop(generator)
        video, audio = read_clip(row.path, t0, tau_v, tau_a, self.frames, self.fps, self.size,
                                 window, row.stop)
        return (video.flip(-2) if mirrored else video), audio


class ActionClips(Dataset):
    """Labelled clips for action recognition (§3.1). Their sound is not read.

    Args:
        rows: a row given ten times is drawn from ten times an epoch. A file shorter than a clip is
            continued by its last frame.
        classes: names of the classes, in the order of the labels.
        frames, fps, size, seed, and items: as of AudioVisualClips.
        clips_per_file: None to train | n to evaluate on n evenly spaced clips.
        crops: of each evaluation clip: 1 in the middle, or 3 along the longer side.
    """

    def __init__(self, rows, classes, frames=32, fps=30, size=128, seed=0,
                 clips_per_file=None, crops=1):
        self.rows, self.classes = rows, classes
        self.frames, self.fps, self.size, self.seed = frames, fps, size, seed
        self.clips_per_file, self.crops = clips_per_file, crops

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        if self.clips_per_file is None:
            return draw_or_replace(self, *key)
        return read_or_name(self, key)

    def read(self, row):
        """The evaluation clips of a file: video (n c, T, H, W, 3) uint8, and its label."""
        video, _ = evenly_spaced(self, row.path, row.video_duration, row.video_start,
                                 row.video_stop, self.crops, sound=False)
        return video, self.classes.index(row.label)

    def draw(self, row, generator):
        """One training clip: video (T, H, W, 3) uint8, and its label."""
        room = max(0, row.video_duration - self.frames / self.fps)
        t0 = row.video_start + room * float(torch.rand((), generator=generator))
        window = random_resized_crop(generator)
        seed = int(torch.randint(2 ** 62, (), generator=generator))
        video, _ = read_clip(row.path, t0, (1,), (), self.frames, self.fps, (self.size, self.size),
                             window, row.video_stop)
        return flip_jitter(video[0], seed).contiguous(), self.classes.index(row.label)


def evenly_spaced(dataset, path, duration, start=0, stop=None, crops=1, sound=True):
    """Read the evaluation clips of a file at speed 1, spaced evenly over `duration` s from `start`.

    Each clip is cut `crops` times (1: the middle; 3: both ends of the longer side and the middle).
    Returns video (clips * crops, T, H, W, 3) uint8 and audio (clips, L), empty without `sound`.
    stop, and errors: see read_clip.
    """
    T, fps, size, n = dataset.frames, dataset.fps, dataset.size, dataset.clips_per_file
    room = max(0, duration - T / fps)
    window = centre_crop if crops == 1 else centre_band
    clips = [read_clip(path, start + t0, (1,), (1,) if sound else (), T, fps, size, window, stop)
             for t0 in (np.linspace(0, room, n) if n > 1 else [room / 2])]
    video, audio = (torch.cat(x) for x in zip(*clips))          # (clips, T, H', W', 3), (clips, L)
    places = (0.5,) if crops == 1 else (0, 0.5, 1)
    video = torch.stack([crop_at(video, size, place) for place in places], 1)
    return video.flatten(0, 1), audio


def make_loader(dataset, batch_size, workers=None, epochs=1):
    """A DataLoader over this process's share of an AudioVisualClips or ActionClips.

    To train, it gives the shuffled batches of all epochs, from the place in its batch_sampler on.
    To evaluate, it goes through the files once. workers: loading processes, or None for all cores
    of this process but one, at most 8.
    """
    if workers is None:
        workers = min(8, max(1, cores_per_process() - 1))
    # No timeout, because of findings/dataloader-timeout-delays-the-news.sh
    common = dict(num_workers=workers, collate_fn=collate, worker_init_fn=end_with_trainer,
                  pin_memory=torch.cuda.is_available())
    atexit.register(end_workers)
    if dataset.clips_per_file is not None:
        share = range(rank(), len(dataset), world_size())
        return DataLoader(dataset, batch_size, sampler=share, **common)
    batches = TrainingBatches(len(dataset), batch_size, epochs, dataset.seed, rank(), world_size())
    return DataLoader(dataset, batch_sampler=batches, generator=torch.Generator(), **common)
