"""Audio <-> video retrieval (§3.3, Tables 1 and 3).

    python retrieval.py                                                     # the built-in set, after python pretrain.py
    python retrieval.py --data kinetics --checkpoint runs/k400/checkpoint.pt
    torchrun --nproc_per_node=8 retrieval.py --data kinetics --checkpoint runs/k400/checkpoint.pt

Each clip of the test part queries with its sound all videos of that part, and with its video all sounds, at speed 1.
Two rules side by side, each with its standard error and beside its chance: instance-level, the clip's own other half
is among the top k; and class-level, a clip of the query's class is. (Table 3's figures lie at class-level chance for
34 classes.) The table is printed and kept as retrieval.json beside the checkpoint.

n clips in the pool, D feature width, B clips of a batch.
"""

import argparse
import json
from argparse import Namespace
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from augment import LogMel, normalize_frames
from data import AudioVisualClips, evaluation_batches
from models import C, SvaCLR, read_state
from pretrain import loading_workers, precision, rows_of, run

RANKS = (1, 5, 10, 20)


@torch.no_grad()
def extract(model, clips, batch_size, workers, device, dtype, feature="z", rank=0, world=1,
            max_failures=0.05):
    """Features of all clips, sound (n, D) and video (n, D), on every process: unit length, the mean over the clips of a
    file, unit length again. feature: "z", the projections | "y", the encoder outputs (l(y) where l is no identity).
    Third, the n rows of `clips` that they are of: a file that fails has neither feature, and
    ValueError is raised where more than the share `max_failures` of the files fail.

    clips: AudioVisualClips with clips set. Kept by index, so any number of processes counts no clip twice.
    """
    model.eval()
    log_mel, width = LogMel().to(device), model.h_v[-1].out_features if feature == "z" else C
    features = torch.zeros(2, len(clips), width, device=device)                     # sound, video
    read = torch.zeros(len(clips), device=device)         # 1 where the file was read
    for frames, waves, index in evaluation_batches(clips, batch_size, workers, rank, world,
                                                   max_failures):
        video, audio = normalize_frames(frames.to(device)), log_mel(waves.to(device))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            y_v, y_a, z_v, z_a = model(video, audio)                                # (B, clips of a file, C or D)
        both = torch.stack([z_a, z_v] if feature == "z" else [y_a, y_v]).float()    # (2, B, clips of a file, D)
        features[:, index] = F.normalize(F.normalize(both, dim=3).mean(2), dim=2)   # (2, B, D)
        read[index] = 1
    if world > 1:
        dist.all_reduce(features)                         # every index is filled by one process, zero on the others
        dist.all_reduce(read)
    if not torch.isfinite(features).all():
        raise ValueError("features are not finite: the checkpoint's training has diverged")
    kept = read.nonzero().flatten().tolist()
    return features[0, kept], features[1, kept], [clips.rows[n] for n in kept]


def ranks(query, gallery, labels, first=0, last=None, chunk=256):
    """How many of the gallery come before the answer of queries first..last: (instance-level, class-level), each
    (last - first,) int64. query, gallery: (n, D), row i of both from clip i. labels: (n,) int64.

    Instance-level, the answer is the clip's own other half; class-level, the nearest of the query's class, the own half
    included. A tie counts against the query. Similarities are held for `chunk` queries at a time: O(chunk n) memory.
    """
    instance, classes = [], []
    for i in torch.arange(first, len(query) if last is None else last, device=query.device).split(chunk):
        s = query[i] @ gallery.T                                                    # (chunk, n)
        own = s.gather(1, i[:, None])                                               # (chunk, 1)
        instance.append((s >= own).sum(1) - 1)
        same = labels[i][:, None] == labels                                         # (chunk, n)
        best = s.masked_fill(~same, -torch.inf).amax(1, keepdim=True)               # (chunk, 1)
        classes.append((s.masked_fill_(same, -torch.inf) >= best).sum(1))
    empty = query.new_zeros(0, dtype=torch.int64)
    return torch.cat([empty, *instance]), torch.cat([empty, *classes])


def recall_at_k(query, gallery, labels, ks=RANKS):
    """Share of queries whose answer is among their k nearest: {k: (instance-level, class-level)}. See `ranks`."""
    return shares(torch.stack(ranks(query, gallery, labels)), ks)


def shares(before, ks=RANKS):
    """{k: (instance-level, class-level)} of ranks from 0, (2, n)."""
    return {k: tuple((before < k).double().mean(1).tolist()) for k in ks}


def chance(labels, ks=RANKS):
    """What random features reach: {k: (instance-level, class-level)}. Class-level: 1 - C(n-m, k) / C(n, k), averaged
    over queries, m being the size of the query's class."""
    n, m = len(labels), torch.bincount(labels)[labels].double()                     # m (n,)
    draws = torch.arange(max(ks), device=m.device)                                  # of a neighbour, without return
    miss = ((n - m[:, None] - draws).clamp(min=0) / (n - draws)).cumprod(1)         # (n, max k), no hit in draws 0..j
    return {k: (k / n, 1 - miss[:, k - 1].mean().item()) for k in ks}


def load(args, rank=0, world=1):
    """What --checkpoint and --data name: the model, its arguments, the clips of the part, and {path: reason} left out.

    Raises ValueError where the checkpoint is not pretrain.py's or the data cannot be read.
    """
    path = Path(args.checkpoint)
    state = read_state(path, ("model", "args"))
    then = Namespace(**state["args"])
    model = SvaCLR(then.arch, then.mapping)
    model.load_state_dict(state["model"])
    kept = path.parent / "manifest.csv"                   # of the data it was trained on
    data = args.data or (kept if kept.exists() else then.data)
    rows, left_out = rows_of(data, args.split, path.parent / "retrieval", rank, world)
    clips = AudioVisualClips(rows, then.frames, then.fps, then.size, clips=args.clips)
    return model, then, clips, left_out | clips.left_out


def classes_of(rows, split, left_out):
    """The names of the rows' classes, sorted. Raises ValueError where these rows are no pool to
    rank: too few, or of one class. left_out: {path: reason}, for the message."""
    names = sorted({row.label for row in rows})
    if len(rows) < max(RANKS):
        causes = Counter(left_out.values()).most_common(3)
        raise ValueError(f"{len(rows)} usable clips in the {split!r} part, R@{max(RANKS)} needs {max(RANKS)} or more; left "
                         "out: " + (", ".join(f"{n} {reason}" for reason, n in causes) or "none"))
    if len(names) < 2:
        raise ValueError(f"all clips are of one class, {names[0]!r}: class-level retrieval needs two, see the label column")
    return names


def evaluate(args, device, rank, world):
    """§3.3: features of the part, ranks both ways, the table. Raises ValueError where there is nothing to rank."""
    model, _, clips, left_out = load(args, rank, world)
    classes_of(clips.rows, args.split, left_out)          # before the work
    dtype, _ = precision("auto", device)
    sound, video, rows = extract(model.to(device), clips, 8, loading_workers(), device, dtype,
                                 args.feature, rank, world, args.max_failures)
    failed = dict.fromkeys({row.path for row in clips.rows} - {row.path for row in rows}, "failed")
    names = classes_of(rows, args.split, left_out | failed)
    labels = torch.tensor([names.index(row.label) for row in rows], device=device)

    n, results = len(rows), {}
    first, last = n * rank // world, n * (rank + 1) // world      # each process ranks its share of the queries
    for way, q, g in (("audio -> video", sound, video), ("video -> audio", video, sound)):
        before = labels.new_zeros(2, n)
        before[0, first:last], before[1, first:last] = ranks(q, g, labels, first, last)
        if world > 1:
            dist.all_reduce(before)
        results[way] = shares(before)
    if rank == 0:
        report(args, n, names, len(left_out), len(clips), results, chance(labels))


def report(args, n, names, left_out, videos, results, base):
    """Print the table, and keep it as retrieval.json. Of `videos` files n could be read."""
    path = Path(args.checkpoint)
    failed = f"; {videos - n} of {videos} videos failed" if n < videos else ""
    print(f"{path}, {n} clips of {len(names)} classes ({left_out} left out{failed}), {args.clips} clips per file, feature "
          f"{args.feature}, R@k in % +- standard error")
    print(f"{'':24}" + "".join(f"{f'R@{k}':>13}" for k in RANKS))
    kept = {"checkpoint": str(path), "data": args.data, "split": args.split, "clips_per_file": args.clips,
            "feature": args.feature, "pool": n, "classes": len(names), "left_out": left_out,
            "videos": videos, "failed": videos - n}
    for level, name in enumerate(("instance", "class")):
        for way, found in results.items():
            errors = {k: (found[k][level] * (1 - found[k][level]) / n) ** 0.5 for k in RANKS}
            print(f"{name:9}{way:15}" + "".join(f"{100 * found[k][level]:6.1f} +- {100 * errors[k]:3.1f}" for k in RANKS))
            kept[f"{name}, {way}"] = {f"R@{k}": [found[k][level], errors[k]] for k in RANKS}
        print(f"{name:9}{'chance':15}" + "".join(f"{100 * base[k][level]:6.1f}{'':7}" for k in RANKS))
        kept[f"{name}, chance"] = {f"R@{k}": base[k][level] for k in RANKS}
    (path.parent / "retrieval.json").write_text(json.dumps(kept, indent=1))


def main():
    """The command."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--checkpoint", default="runs/svaclr/checkpoint.pt", help="of pretrain.py (default runs/svaclr/checkpoint.pt)")
    p.add_argument("--data", help="folder or manifest.csv (default: what the checkpoint was trained on)")
    p.add_argument("--split", default="test", help="the part to search (default test)")
    p.add_argument("--clips", type=int, default=10, help="clips per file, averaged (10; paper silent, GDT)")
    p.add_argument("--feature", default="z", choices=["z", "y"], help="projections or encoder outputs (default z)")
    p.add_argument("--max-failures", type=float, default=0.05, help="share of videos that may fail "
                   "to be read and are then left out; more stop it (0.05; this project's)")
    args = p.parse_args()
    if args.clips < 1:
        p.error(f"--clips {args.clips}: 1 or more")
    if not 0 <= args.max_failures < 1:
        p.error(f"--max-failures {args.max_failures}: 0 or more, less than 1")
    run(evaluate, args)


if __name__ == "__main__":
    main()
