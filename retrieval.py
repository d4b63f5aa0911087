"""Audio <-> video retrieval (§3.3, Tables 1 and 3).

    python retrieval.py                                 # the built-in set, after python pretrain.py
    python retrieval.py --data k400.csv --split val --checkpoint runs/k400/checkpoint.pt
    torchrun --nproc_per_node=8 retrieval.py --data k400.csv --split val \\
        --checkpoint runs/k400/checkpoint.pt

The sound of each test clip queries the videos of all test clips, and its video queries all sounds,
at speed 1. Instance-level, the clip's own other half is among the top k. Class-level, a clip of the
query's class is. (Table 3 lies at the class-level chance for 34 classes.) The script prints the
table, with standard errors and chance, and writes retrieval.json beside the checkpoint.

Symbols: n clips in the pool, C width of y, D width of z or of either feature, B files of a batch,
T frames, L samples.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F

from augment import normalize_frames
from data import AudioVisualClips, find_rows, make_loader
from models import C, SvaCLR
from prepare.weights import sound_input
from support.batches import evaluation_batches, gather_results
from support.checkpoints import load_svaclr
from support.commands import add_reading_flags, at_least
from support.launch import launch
from support.precision import autocast, choose_precision
from support.processes import say
from support.recall_table import check_size, report, results_path

RANKS = (1, 5, 10, 20)


def parser(description):
    """The flags of retrieval, to which experiments.search adds its own."""
    p = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", default="runs/svaclr/checkpoint.pt",
                   help="checkpoint.pt of pretrain.py (runs/svaclr/checkpoint.pt)")
    p.add_argument("--data", help="folder or manifest.csv (default: the training data's)")
    p.add_argument("--split", default="test", help="part to search, or all (test)")
    p.add_argument("--clips", type=at_least(1), default=10,
                   help="clips of a file, averaged (10; paper silent, GDT)")
    p.add_argument("--feature", default="z", choices=["z", "y"],
                   help="projections z or encoder outputs y (z; our choice)")
    add_reading_flags(p)
    return p


def parse(argv=None):
    """The arguments of the command line. Bad ones end the script with a sentence and status 2."""
    return parser(__doc__).parse_args(argv)


@torch.no_grad()
def embed(model, log_mel, dtype, frames, waves):
    """Encoder outputs (l(y) if l is not the identity) and projections of files at speed 1.

    frames (B, n, T, H, W, 3) uint8, waves (B, n, L) -> y (B, 2, C), z (B, 2, D). On the second axis
    0 is the sound, and 1 the pictures. n: clips of a file.
    """
    device = next(model.parameters()).device
    audio, video = log_mel(waves.to(device)), normalize_frames(frames.to(device))
    with autocast(device, dtype):
        ly_a, ly_v, z_a, z_v = model(audio, video)                      # (B, n, C or D)
    return average(torch.stack([ly_a, ly_v], 1)), average(torch.stack([z_a, z_v], 1))


def average(x):
    """A file's feature is the mean over its clips' unit-length features, at unit length again.

    (..., n, D) -> (..., D), float32.
    """
    return F.normalize(F.normalize(x.float(), dim=-1).mean(-2), dim=-1)


def extract(model, clips, dtype, sound=None, workers=None, max_failures=0.05):
    """Features of all files on every process: {"y": (n, 2, C), "z": (n, 2, D)}, and their n rows.

    Args:
        clips: AudioVisualClips with clips_per_file.
        dtype: of autocast.
        sound: the input of g, see prepare.weights.sound_input.
        workers: see data.make_loader.
        max_failures: share of the files that may fail to be read; ValueError if more do.
    """
    model.eval()
    device, found = next(model.parameters()).device, {}
    log_mel = sound_input(sound).to(device)
    for frames, waves, index in evaluation_batches(make_loader(clips, 8, workers), max_failures):
        both = torch.cat(embed(model, log_mel, dtype, frames, waves), 2)        # (B, 2, C + D)
        found.update(zip(index, both))
    both, read = gather_results(found, "features")                      # (n, 2, C + D)
    return {"y": both[..., :C], "z": both[..., C:]}, [clips.rows[n] for n in read]


def ranks(query, gallery, labels, chunk=256):
    """How many of the gallery come before the answer of each query.

    Instance-level, the answer is the clip's own other half. Class-level, it is the nearest clip of
    the query's class, the own half included. A tie counts against the query. The similarities of
    `chunk` queries are held at a time: O(chunk n) memory. query, gallery: (n, D), row i of both
    from clip i. labels: (n,) int64. Returns two (n,) int64, instance- and class-level.
    """
    instance, classes = [], []
    for i in torch.arange(len(query), device=query.device).split(chunk):
        s = query[i] @ gallery.T                                        # (chunk, n)
        own = s.gather(1, i[:, None])                                   # (chunk, 1)
        instance.append((s >= own).sum(1) - 1)
        same = labels[i][:, None] == labels                             # (chunk, n)
        best = s.masked_fill(~same, -torch.inf).amax(1, keepdim=True)   # (chunk, 1)
        classes.append((s.masked_fill_(same, -torch.inf) >= best).sum(1))
    return torch.cat(instance), torch.cat(classes)


def recall_at_k(query, gallery, labels):
    """Share of queries whose answer is in their k nearest: {k: (instance-level, class-level)}."""
    rank = torch.stack(ranks(query, gallery, labels))                   # (2, n)
    return {k: tuple((rank < k).double().mean(1).tolist()) for k in RANKS}


def chance(labels, gallery_labels=None):
    """Recall of random features: {k: (instance-level, class-level)}.

    At class level it is 1 - C(n-m, k) / C(n, k) for a query whose class has m of the n clips,
    averaged. labels: (n,) int64. gallery_labels: those of the clips that are found, if others.
    """
    found = labels if gallery_labels is None else gallery_labels
    n = len(found)
    m = torch.bincount(found, minlength=int(labels.max()) + 1)[labels].double()
    draws = torch.arange(RANKS[-1], device=m.device)                    # neighbours drawn before
    miss = ((n - m[:, None] - draws).clamp(min=0) / (n - draws)).cumprod(1)     # (queries, max k)
    return {k: (k / n, 1 - miss[:, k - 1].mean().item()) for k in RANKS}


def load(args):
    """The model and settings of --checkpoint, the clips of --data, and {path: reason left out}."""
    model, settings = load_svaclr(args.checkpoint, SvaCLR)
    rows, left_out = find_part(args, args.split, settings.data)
    clips = AudioVisualClips(rows, settings.frames, settings.fps, settings.size,
                             clips_per_file=args.clips)
    return model, settings, clips, left_out | clips.left_out


def find_part(args, split, trained_on):
    """The usable rows of a part of the data, or of "all", and {path: reason} of the other files.

    Where --data is missing it is filled in: the csv that the model was trained on, else the
    manifest beside the checkpoint, else trained_on: None is the built-in set, "" is unknown. Raises
    ValueError if data or parts are missing.
    """
    folder = results_path(args.checkpoint).parent
    manifest = folder / "manifest.csv"          # of a scan, which training on a csv does not make
    scanned = manifest.exists() and not str(trained_on).endswith(".csv")
    args.data = args.data or (str(manifest) if scanned else trained_on)
    if args.data == "":
        raise ValueError(f"--checkpoint {args.checkpoint} does not say what data it is to be "
                         "measured on: give --data")
    out = folder / "retrieval" if args.data else folder     # the built-in set lies beside OUT
    rows, left_out = find_rows(args.data, None if split == "all" else split, out)
    if split != "all" and rows and not any(row.split for row in rows):
        raise ValueError(f"--data {args.data} has no parts (its split column is empty): make them "
                         "by python -m prepare.manifest folder ROOT --test-share 0.2 and train "
                         "anew, or search all clips, those of the training too, by --split all")
    return rows, left_out


def evaluate(args, device):
    """§3.3: extract the features of the part, rank both ways, report."""
    model, settings, clips, left_out = load(args)
    check_size(len(clips), args.split, left_out, max(RANKS))            # before the work
    dtype, reason = choose_precision(settings.precision, device)
    say(f"{len(clips)} files on {device.type}, {str(dtype)[6:]} ({reason})")
    found, rows = extract(model.to(device), clips, dtype, settings.sound, args.workers,
                          args.max_failures)
    audio, video = found[args.feature].to(device).unbind(1)             # (n, D) x 2
    failed = dict.fromkeys(range(len(clips) - len(rows)), "failed")
    check_size(len(rows), args.split, left_out | failed, max(RANKS))
    _, labels = np.unique([row.label for row in rows], return_inverse=True)
    labels = torch.from_numpy(labels).to(device)                        # (n,)
    report(args, rows, len(left_out), len(clips),
           {"audio -> video": recall_at_k(audio, video, labels),
            "video -> audio": recall_at_k(video, audio, labels), "chance": chance(labels)})


if __name__ == "__main__":
    launch(evaluate, parse())
