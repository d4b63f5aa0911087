"""The data (§3.1): manifest row -> one container, one decode pass -> the views of one clip -> batches.

    rows = read_manifest("manifest.csv")                              # python -m prepare.manifest makes it
    clips = AudioVisualClips(rows, frames=30, fps=30, size=128, max_speed=4)
    for video, audio, failures in make_loader(clips, batch_size=8): ...   # (B, K, T, H, W, 3) uint8, (B, K, L) float32

A view at speed s covers s times the source in the same number of frames and samples (§2.1):

    source       t0 |----------------|----------------|----------------|----------------|   T / fps seconds each
    view 0          |x x x x x x x x |
    view 1, s = 3   |x     x     x     x     x     x     x     x |

B clips, K views, T frames, H, W pixels, L samples. Nothing is opened in the parent process.
"""

import atexit
import csv
import multiprocessing
import signal
import sys
from collections import namedtuple
from pathlib import Path

import av
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from augment import crop_at, crop_flip, crop_flip_jitter, sample_speeds, speed_up_audio, speed_up_video
from support.reading import RATE, read

TRIES = 10                                                # files that may fail in a row before a run stops


class TooManyFailures(Exception):
    """Files fail so often that the data, not a file, is at fault."""


# duration: s that pictures and sound both cover; the pictures' where there is no sound that can be
# used (has_audio False; the note tells why).
Row = namedtuple("Row", "path label split duration video_duration has_audio note")


def read_manifest(path, split=None):
    """The usable rows of a manifest.csv, those of one split if it is named, and the others as {path: reason}.

    A manifest without splits has one part, taken whatever `split` says. Raises ValueError where the file is no
    manifest or has no such part.
    """
    path = Path(path)
    with open(path, newline="", encoding="utf-8-sig") as file:
        table = list(csv.DictReader(file))
    lacking = {*Row._fields, "reason"} - table[0].keys() if table else {"rows"}
    if lacking:
        raise ValueError(f"{path} is no manifest of this version, it lacks "
                         f"{', '.join(sorted(lacking))}: make one with python -m prepare.manifest")
    splits = sorted({line["split"] for line in table})
    if split is not None and splits != [""]:
        if split not in splits:
            raise ValueError(f"{path} has no {split!r} part, it has {', '.join(map(repr, splits))}: give data that has it "
                             "(pretrain.py and retrieval.py take another --split)")
        table = [line for line in table if line["split"] == split]
    usable = [Row(line["path"], line["label"], line["split"], float(line["duration"]),
                  float(line["video_duration"]), line["has_audio"] == "1", line["note"])
              for line in table if not line["reason"]]
    return usable, {line["path"]: line["reason"] for line in table if line["reason"]}


def read_clip(path, t0, tau_v=(1,), tau_a=(1,), frames=30, fps=30, short_side=160):
    """All views of one clip, which covers [t0, t0 + max(tau) * frames / fps) of the file.

    Args:
        t0: start in s after the pictures begin or, if sound is read, after both have begun. Frames are
            chosen by time stamp (the nearest), so the source may have any frame rate. Past the end the
            last frame stands and the sound is silent.
        tau_v, tau_a: speeds of the video and of the audio views, integers >= 1. tau_a = (): no sound is read.
        frames, fps: T frames, taken 1/fps s apart at speed 1; the sound of a view lasts as long.
        short_side: of the frames in pixels; the longer side keeps the aspect.
    Returns:
        video (K, T, H, W, 3) uint8, audio (K, L) float32 at 24 kHz, L = 24000 frames / fps.
        Raises ValueError naming the path and the cause where the file does not give them.
    """
    steps = torch.stack([speed_up_video(torch.arange(frames * s), s) for s in tau_v])   # (K, T), in 1/fps s
    steps, where = steps.unique(return_inverse=True)                                # (n,), (K, T)
    L = round(RATE * frames / fps)
    try:
        times = (t0 + steps / fps).tolist()                                         # s
        images, wave = read(path, times, max(tau_a, default=0) * L, short_side)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    views = np.stack([images[n] for n in where.flatten().tolist()])                 # (K T, H, W, 3)
    video = torch.from_numpy(views).unflatten(0, where.shape)                       # (K, T, H, W, 3)
    audio = [speed_up_audio(torch.from_numpy(wave[:s * L]), s) for s in tau_a]
    return video, torch.stack(audio) if audio else torch.empty(0, L)                # (K, L)


class AudioVisualClips(Dataset):
    """The co-augmented views of a clip for pre-training, or its evenly spaced clips at speed 1 for evaluation.

    Args:
        rows: from read_manifest. Rows without sound or shorter than one clip are left out, see `left_out`.
        frames, fps, size: T frames, 1/fps s apart, size x size pixels.
        max_speed: S of §2.1. A file too short for S draws from the speeds that fit it.
        seed: what is drawn (place, speeds, scale, crop, flip) is a function of (seed, epoch, index) alone.
        clips: None to train; n to evaluate: n clips from the first to the last second of the file, centre crop.
    Items:
        training, of key (epoch, index): video (K, T, H, W, 3) uint8, audio (K, L) float32, failures, a list of str.
        A file that fails is replaced by another draw and named in failures; TooManyFailures when 10 in a row fail.
        evaluation, of key index: video (n, T, H, W, 3), audio (n, L), (index, None). Where the file
        fails: None, None, (index, its path and the cause).
    """

    def __init__(self, rows, frames=30, fps=30, size=128, max_speed=4, seed=0, clips=None):
        self.frames, self.fps, self.size, self.max_speed, self.seed, self.clips = frames, fps, size, max_speed, seed, clips
        self.seconds = frames / fps
        self.rows, self.left_out = [], {}
        for row in rows:
            if not row.has_audio:
                self.left_out[row.path] = row.note or "no audio stream"
            elif row.duration < self.seconds - 0.5 / fps:
                self.left_out[row.path] = f"shorter than one clip of {self.seconds:.2f} s"
            else:
                self.rows.append(row)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        return draw_or_replace(self, *key) if self.clips is None else evenly_spaced(self, key, 1, sound=True)

    def draw(self, row, generator):
        fits = max(1, int(row.duration / self.seconds + 1e-3))
        K = 1 if self.max_speed == 1 else 2               # without co-augmentation there is one view
        tau_v, tau_a = (tau[:K] for tau in sample_speeds(min(self.max_speed, fits), generator))
        room = row.duration - max(tau_v + tau_a) * self.seconds
        t0 = max(0, room) * float(torch.rand((), generator=generator))
        short_side = int(self.size * (8 + 2 * float(torch.rand((), generator=generator))) / 7)   # 128..160 for 112: GDT
        video, audio = read_clip(row.path, t0, tau_v, tau_a, self.frames, self.fps, short_side)
        return crop_flip(video, self.size, generator).contiguous(), audio


class ActionClips(Dataset):
    """Labelled clips of videos for action recognition (§3.1), their sound unread.

    Args:
        rows: from read_manifest; a row given ten times is drawn from ten times an epoch. A file shorter than a clip
            ends with its last frame repeated.
        classes: the names, in the order of the labels.
        frames, fps, size, seed, clips: as in AudioVisualClips.
        crops: per clip, to evaluate: 1, the middle, or 3 along the longer side.
    Items:
        training, of key (epoch, index): video (T, H, W, 3) uint8, label, failures.
        evaluation, of key index: video (clips * crops, T, H, W, 3), label, (index, None). Where the
        file fails: None, label, (index, its path and the cause).
    """

    def __init__(self, rows, classes, frames=32, fps=30, size=128, seed=0, clips=None, crops=3):
        self.rows, self.classes, self.frames, self.fps, self.size = rows, classes, frames, fps, size
        self.seed, self.clips, self.crops, self.left_out = seed, clips, crops, {}

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        if self.clips is None:
            return draw_or_replace(self, *key)
        video, _, last = evenly_spaced(self, key, self.crops, sound=False)
        return video, self.classes.index(self.rows[key].label), last

    def draw(self, row, generator):
        t0 = max(0, row.video_duration - self.frames / self.fps) * float(torch.rand((), generator=generator))
        video, _ = read_clip(row.path, t0, (1,), (), self.frames, self.fps, 2 * self.size)   # 0.14 of the area: near size
        seed = int(torch.randint(2 ** 62, (), generator=generator))
        return crop_flip_jitter(video[0], self.size, seed).contiguous(), self.classes.index(row.label)


def draw_or_replace(clips, epoch, index):
    """(*clips.draw of row `index`, failures). A file that fails is replaced by another draw and named in `failures`."""
    seed = np.random.SeedSequence([clips.seed, epoch, index]).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(seed))
    failures = []
    while len(failures) < TRIES:
        try:
            return *clips.draw(clips.rows[index], generator), failures
        except ValueError as error:
            failures.append(str(error))
            index = int(torch.randint(len(clips.rows), (), generator=generator))
    raise TooManyFailures(f"{TRIES} files in a row failed, the last: {failures[-1]}")


class EpochBatches(Sampler):
    """Batches of (epoch, index) for one of several processes: a permutation by (seed, epoch), dealt out in turn.

    The keys carry the epoch, so that workers which live through all epochs draw anew in each. Clips that do not
    fill a batch on every process are left to other epochs. Set `epoch`, and `start`, how many clips of it have been
    used already by however many processes, before iterating.
    """

    def __init__(self, clips, batch_size, rank=0, world=1, seed=0):
        self.clips, self.batch_size, self.rank, self.world, self.seed = clips, batch_size, rank, world, seed
        self.epoch = self.start = 0

    def __len__(self):
        return self.clips // (self.batch_size * self.world)

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.clips)[self.start:]
        whole = len(order) // (self.batch_size * self.world) * self.batch_size * self.world
        for batch in order[:whole][self.rank::self.world].reshape(-1, self.batch_size).tolist():
            yield [(self.epoch, index) for index in batch]


def evenly_spaced(clips, index, crops, sound):
    """clips.clips clips at speed 1 from the first to the last second of file `index`, each cut `crops` times (1: the
    middle; 3: both ends of the longer side and the middle): video (clips * crops, T, H, W, 3),
    audio (clips, L, or nothing without sound), (index, None). None, None, (index, path and cause)
    where the file fails."""
    row, n, T, fps, size = clips.rows[index], clips.clips, clips.frames, clips.fps, clips.size
    room = max(0, (row.duration if sound else row.video_duration) - T / fps)
    try:
        views = [read_clip(row.path, t0, (1,), (1,) * sound, T, fps, size * 8 // 7)
                 for t0 in (np.linspace(0, room, n) if n > 1 else [room / 2])]
    except ValueError as error:
        return None, None, (index, str(error))
    video, audio = (torch.cat(x) for x in zip(*views))                              # (clips, T, H', W', 3), (clips, L)
    video = torch.stack([crop_at(video, size, end) for end in ((0.5,) if crops == 1 else (0, 0.5, 1))], 1)
    return video.flatten(0, 1), audio, (index, None)


def collate(samples):
    """[(video, audio or label, last)] -> video (B, ...), audio (B, ...) or labels (B,), [last].
    Samples without a video keep only their `last`; where none has one, the first two are None."""
    last = [sample[2] for sample in samples]
    read = [sample for sample in samples if sample[0] is not None]
    if not read:
        return None, None, last
    video, second, _ = zip(*read)
    return torch.stack(video), torch.stack([torch.as_tensor(x) for x in second]), last


def leave_signals_to_the_trainer(_):
    """In a loading process: a scheduler signals the whole job, and the trainer, which saves then, needs its data."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """At the trainer's exit, for the SIGTERM that would end them then is ignored too."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


def make_loader(clips, batch_size, workers=0, rank=0, world=1):
    """DataLoader over AudioVisualClips or ActionClips: shuffled by epoch to train, in order (every world-th) to evaluate.

    Workers stay alive between epochs. `loader.batch_sampler.epoch` and `.start` say where training goes on.
    """
    common = dict(num_workers=workers, collate_fn=collate, pin_memory=torch.cuda.is_available())
    if clips.clips is not None:
        return DataLoader(clips, batch_size, sampler=range(rank, len(clips), world), **common)
    batches = EpochBatches(len(clips), batch_size, rank, world, clips.seed)
    atexit.register(end_workers)
    return DataLoader(clips, batch_sampler=batches, persistent_workers=workers > 0, generator=torch.Generator(),
                      worker_init_fn=leave_signals_to_the_trainer, **common)


def evaluation_batches(clips, batch_size, workers, rank, world, max_failures):
    """This process's part of an evaluation, with a progress bar: video (B, ...), audio (B, ...) or
    labels (B,), and a list of the B indices.

    A video that fails is named on stderr and left out. Raises ValueError where more than the share
    `max_failures` of all videos fail: at once where those of one process are too many already, else
    after the last batch, on all processes.
    """
    def stop_if_too_many():
        if len(causes) > max_failures * len(clips):
            raise ValueError(f"{len(causes)} of {len(clips)} videos failed, more than a share of "
                             f"{max_failures:g}, the last: {causes[-1]}; all are named above: "
                             "check the disk, mend these files or take them out of the data, or "
                             "let more fail (--max-failures of retrieval.py and finetune.py)")

    causes = []
    loader = make_loader(clips, batch_size, workers, rank, world)
    for video, second, last in tqdm(loader, desc="evaluating", unit="batch", disable=rank > 0,
                                    file=sys.stderr):
        for index, cause in last:
            if cause:
                causes.append(cause)
                tqdm.write(f"failed: {cause}", file=sys.stderr)
        stop_if_too_many()
        if video is not None:
            yield video, second, [index for index, cause in last if not cause]
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, causes)
        causes = sum(gathered, [])
        stop_if_too_many()
