"""Audio <-> video retrieval (§3.3, Tables 1 and 3).

    python retrieval.py                                 # the built-in set, after python pretrain.py
    python retrieval.py --data kinetics --checkpoint runs/k400/checkpoint.pt
    torchrun --nproc_per_node=8 retrieval.py --data kinetics --checkpoint runs/k400/checkpoint.pt

The sound of each test clip queries the videos of all test clips, and its video queries all sounds,
at speed 1. Two rules stand side by side, each with its standard error and its chance.
Instance-level: the clip's own other half is among the top k. Class-level: a clip of the query's
class is among the top k. (Table 3 lies at the class-level chance for 34 classes.) The script prints
the table and writes retrieval.json beside the checkpoint.

Symbols: n clips in the pool, D feature width, B clips of a batch.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from augment import GDTLogMel, LogMel, normalize_frames
from data import AudioVisualClips, evaluation_batches, find_rows
from models import C, load_svaclr
from support.processes import (at_least, autocast, choose_precision, launch, rank, share,
                               world_size)

RANKS = (1, 5, 10, 20)


def parse(argv=None):
    """The arguments of the command line. Bad ones end the script with a sentence and status 2."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--checkpoint", default="runs/svaclr/checkpoint.pt",
                   help="checkpoint.pt of pretrain.py (runs/svaclr/checkpoint.pt)")
    p.add_argument("--data", help="folder or manifest.csv (default: the training data's)")
    p.add_argument("--split", default="test", help="part to search (test)")
    p.add_argument("--clips", type=at_least(1), default=10,
                   help="clips of a file, averaged (10; paper silent, GDT)")
    p.add_argument("--feature", default="z", choices=["z", "y"],
                   help="projections z or encoder outputs y (z; our choice)")
    p.add_argument("--max-failures", type=share, default=0.05,
                   help="share of videos that may fail to be read and are then left out; more stop "
                   "the script (0.05; our choice)")
    return p.parse_args(argv)


@torch.no_grad()
def extract(model, clips, dtype, feature="z", sound=None, workers=None, max_failures=0.05):
    """Features of all clips on every process: audio (n, D), video (n, D), and their n rows.

    A file's feature is the mean over its clips' unit-length features, brought to unit length again.
    Features are kept by index, so no clip counts twice with any number of processes.

    Args:
        clips: AudioVisualClips with clips_per_file.
        dtype: of autocast.
        feature: "z", the projections | "y", the encoder outputs (l(y) if l is not the identity).
        sound: "gdt" for a model that expects GDT's sound input | None for the log-mel.
        max_failures: share of the files that may fail to be read; ValueError if more do.
    """
    model.eval()
    device = next(model.parameters()).device
    log_mel = (GDTLogMel() if sound == "gdt" else LogMel()).to(device)
    D = model.h_v[-1].out_features if feature == "z" else C
    features = torch.zeros(2, len(clips), D, device=device)             # audio, video
    found = torch.zeros(len(clips), device=device)                      # 1 if the file was read
    for frames, waves, index in evaluation_batches(clips, 8, max_failures, workers):
        audio, video = log_mel(waves.to(device)), normalize_frames(frames.to(device))
        with autocast(device, dtype):
            y_a, y_v, z_a, z_v = model(audio, video)                # (B, clips of a file, C or D)
        both = torch.stack([z_a, z_v] if feature == "z" else [y_a, y_v]).float()
        features[:, index] = F.normalize(F.normalize(both, dim=3).mean(2), dim=2)     # (2, B, D)
        found[index] = 1
    dist.all_reduce(features)           # one process has filled each index, the others have zeros
    dist.all_reduce(found)
    if not torch.isfinite(features).all():
        raise ValueError("features are not finite: the checkpoint's training has diverged")
    found = found.nonzero().flatten().tolist()
    return features[0, found], features[1, found], [clips.rows[n] for n in found]


def ranks(query, gallery, labels, first=0, last=None, chunk=256):
    """How many of the gallery come before the answer of each of the queries first..last.

    Instance-level, the answer is the clip's own other half. Class-level, it is the nearest clip of
    the query's class, the own half included. A tie counts against the query. The similarities of
    `chunk` queries are held at a time: O(chunk n) memory. query, gallery: (n, D), row i of both
    from clip i. labels: (n,) int64. Returns two (last - first,) int64, instance- and class-level.
    """
    instance, classes = [], []
    last = len(query) if last is None else last
    for i in torch.arange(first, last, device=query.device).split(chunk):
        s = query[i] @ gallery.T                                        # (chunk, n)
        own = s.gather(1, i[:, None])                                   # (chunk, 1)
        instance.append((s >= own).sum(1) - 1)
        same = labels[i][:, None] == labels                             # (chunk, n)
        best = s.masked_fill(~same, -torch.inf).amax(1, keepdim=True)   # (chunk, 1)
        classes.append((s.masked_fill_(same, -torch.inf) >= best).sum(1))
    empty = query.new_zeros(0, dtype=torch.int64)
    return torch.cat([empty, *instance]), torch.cat([empty, *classes])


def recall_at_k(query, gallery, labels, ks=RANKS):
    """Share of queries whose answer is in their k nearest: {k: (instance-level, class-level)}."""
    return shares(torch.stack(ranks(query, gallery, labels)), ks)


def shares(before, ks=RANKS):
    """{k: (instance-level, class-level)} of the ranks (2, n), which count from 0."""
    return {k: tuple((before < k).double().mean(1).tolist()) for k in ks}


def chance(labels, ks=RANKS):
    """Recall of random features: {k: (instance-level, class-level)}.

    Class-level it is 1 - C(n-m, k) / C(n, k) for a query whose class has m clips, averaged.
    """
    n, m = len(labels), torch.bincount(labels)[labels].double()         # m (n,)
    draws = torch.arange(max(ks), device=m.device)                      # neighbours drawn before
    miss = ((n - m[:, None] - draws).clamp(min=0) / (n - draws)).cumprod(1)     # (n, max k)
    return {k: (k / n, 1 - miss[:, k - 1].mean().item()) for k in ks}


def load(args):
    """The model and settings of --checkpoint, the clips of --data, and {path: reason left out}."""
    model, settings = load_svaclr(args.checkpoint)
    folder = Path(args.checkpoint).parent
    manifest = folder / "manifest.csv"                                  # of the training data
    data = args.data or (manifest if manifest.exists() else settings.data)
    rows, left_out = find_rows(data, args.split, folder / "retrieval")
    clips = AudioVisualClips(rows, settings.frames, settings.fps, settings.size,
                             clips_per_file=args.clips)
    return model, settings, clips, left_out | clips.left_out


def class_names(rows, split, left_out):
    """The sorted classes of the rows. Raises ValueError if there are too few clips or classes."""
    names = sorted({row.label for row in rows})
    if len(rows) < max(RANKS):
        causes = ", ".join(f"{n} {why}" for why, n in Counter(left_out.values()).most_common(3))
        raise ValueError(f"{len(rows)} usable clips in the {split!r} part, but R@{max(RANKS)} "
                         f"needs {max(RANKS)} or more; left out: {causes or 'none'}")
    if len(names) < 2:
        raise ValueError(f"all clips are of one class, {names[0]!r}: class-level retrieval needs "
                         "two, see the label column")
    return names


def evaluate(args, device):
    """§3.3: extract the features of the part, rank both ways, report."""
    model, settings, clips, left_out = load(args)
    class_names(clips.rows, args.split, left_out)       # complain before the work
    dtype, _ = choose_precision("auto", device)
    audio, video, rows = extract(model.to(device), clips, dtype, args.feature,
                                 getattr(settings, "sound", None), max_failures=args.max_failures)
    failed = {row.path for row in clips.rows} - {row.path for row in rows}
    names = class_names(rows, args.split, left_out | dict.fromkeys(failed, "failed"))
    labels = torch.tensor([names.index(row.label) for row in rows], device=device)

    n, results = len(rows), {}
    first, last = n * rank() // world_size(), n * (rank() + 1) // world_size()
    for way, q, g in (("audio -> video", audio, video), ("video -> audio", video, audio)):
        before = labels.new_zeros(2, n)         # each process ranks its share of the queries
        before[0, first:last], before[1, first:last] = ranks(q, g, labels, first, last)
        dist.all_reduce(before)
        results[way] = shares(before)
    if rank() == 0:
        head = {"checkpoint": str(args.checkpoint), "data": args.data, "split": args.split,
                "clips_per_file": args.clips, "feature": args.feature, "pool": n,
                "classes": len(names), "left_out": len(left_out), "videos": len(clips),
                "failed": len(clips) - n}
        report(head, results, chance(labels))


def report(head, results, base):
    """Print the table, and write it to retrieval.json beside the checkpoint."""
    n, failures = head["pool"], f"; {head['failed']} of {head['videos']} videos failed"
    print(f"{head['checkpoint']}, {n} clips of {head['classes']} classes ({head['left_out']} left "
          f"out{failures * (head['failed'] > 0)}), {head['clips_per_file']} clips per file, "
          f"feature {head['feature']}, R@k in % +- standard error")
    print(f"{'':24}" + "".join(f"{f'R@{k}':>13}" for k in RANKS))
    for level, name in enumerate(("instance", "class")):
        for way, found in results.items():
            recall = [found[k][level] for k in RANKS]
            error = [(p * (1 - p) / n) ** 0.5 for p in recall]
            print(f"{name:9}{way:15}"
                  + "".join(f"{100 * p:6.1f} +- {100 * e:3.1f}" for p, e in zip(recall, error)))
            head[f"{name}, {way}"] = {f"R@{k}": [p, e] for k, p, e in zip(RANKS, recall, error)}
        recall = [base[k][level] for k in RANKS]
        print(f"{name:9}{'chance':15}" + "".join(f"{100 * p:6.1f}{'':7}" for p in recall))
        head[f"{name}, chance"] = {f"R@{k}": p for k, p in zip(RANKS, recall)}
    name = "retrieval" + Path(head["checkpoint"]).stem.removeprefix("checkpoint") + ".json"
    path = Path(head["checkpoint"]).with_name(name)
    path.write_text(json.dumps(head, indent=1))


if __name__ == "__main__":
    launch(evaluate, parse())
