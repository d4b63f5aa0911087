"""Audio <-> video retrieval (§3.3, Tables 1 and 3).

    python retrieval.py                                                     # the built-in set, after python pretrain.py
    python retrieval.py --data kinetics --checkpoint runs/k400/checkpoint.pt
    torchrun --nproc_per_node=8 retrieval.py --data kinetics --checkpoint runs/k400/checkpoint.pt

Each clip of the test part queries with its sound all videos of that part, and with its video all sounds, at speed 1.
Two rules side by side, each beside its chance: instance-level, the clip's own other half is among the top k; and
class-level, a clip of the query's class is. (Table 3's figures lie at class-level chance for 34 classes.)
"""

import argparse
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from augment import LogMel, normalize_frames
from data import AudioVisualClips, make_loader
from models import SvaCLR
from pretrain import cores_per_process, precision, rows_of, setup

RANKS = (1, 5, 10, 20)


@torch.no_grad()
def extract(model, clips, batch_size, workers, device, dtype, rank=0, world=1):
    """Features z_a, z_v (n, D) of all clips, on every process: mean over the clips of a file, unit length again.

    clips: AudioVisualClips with clips = n. Kept by index, so padding or any number of processes counts no clip twice.
    """
    model.eval()
    log_mel = LogMel().to(device)
    z = None
    for frames, waves, index in tqdm(make_loader(clips, batch_size, workers, rank, world), desc="features", unit="batch",
                                     disable=rank > 0, file=sys.stderr):
        video, audio = normalize_frames(frames.to(device)), log_mel(waves.to(device))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            _, _, z_v, z_a = model(video, audio)                                    # (B, n, D), n clips of a file
        z_b = F.normalize(torch.stack([z_a, z_v]).mean(2), dim=2)                   # (2, B, D)
        z = z_b.new_zeros(2, len(clips), z_b.shape[2]) if z is None else z
        z[:, list(index)] = z_b
    if world > 1:
        dist.all_reduce(z)                                # every index is filled by one process, zero on the others
    return z[0], z[1]


def recall_at_k(query, gallery, labels, ks=RANKS):
    """Share of queries with a hit among their k nearest: {k: (instance-level, class-level)}.

    query, gallery: (n, D), row i of both from clip i, unit length. labels: (n,) int64. A tie counts against the query.
    """
    s = query @ gallery.T                                                           # (n, n)
    same = labels[:, None] == labels[None, :]                                       # (n, n), the clip itself included
    own = s.diagonal()[:, None]                                                     # (n, 1)
    before_own = (s >= own).sum(1) - 1                    # others at least as near: the rank of the own half, from 0
    best = s.masked_fill(~same, -torch.inf).amax(1, keepdim=True)                   # (n, 1), nearest of the class
    before_class = ((s >= best) & ~same).sum(1)
    return {k: ((before_own < k).double().mean().item(), (before_class < k).double().mean().item()) for k in ks}


def chance(labels, ks=RANKS):
    """What random features reach: {k: (instance-level, class-level)}. Class-level: 1 - C(n-m, k) / C(n, k), averaged
    over queries, m being the size of the query's class."""
    n, m = len(labels), torch.bincount(labels)[labels].double()                     # m (n,)
    result = {}
    for k in ks:
        miss = torch.ones_like(m)
        for j in range(k):
            miss = miss * ((n - m - j).clamp(min=0) / (n - j))
        result[k] = (k / n, (1 - miss).mean().item())
    return result


def evaluate(args, device, rank, world):
    path = Path(args.checkpoint)
    if not path.exists():
        raise ValueError(f"no checkpoint {path}: run pretrain.py first, or name another with --checkpoint")
    state = torch.load(path, map_location="cpu", weights_only=True)
    then = Namespace(**state["args"])
    model = SvaCLR(then.arch, then.mapping)
    model.load_state_dict(state["model"])
    model = model.to(device)

    kept = path.parent / "manifest.csv"                   # of the data it was trained on
    rows, left_out = rows_of(args.data or (kept if kept.exists() else then.data), args.split, path.parent / "retrieval", rank, world)
    clips = AudioVisualClips(rows, then.frames, then.fps, then.size, clips=args.clips)
    names = sorted({row.label for row in clips.rows})
    labels = torch.tensor([names.index(row.label) for row in clips.rows])
    if len(clips) < max(RANKS):
        raise ValueError(f"{len(clips)} usable clips in the {args.split!r} part: retrieval needs {max(RANKS)} or more")
    dtype, _ = precision("auto", device)
    workers = max(1, cores_per_process() - 1)
    z_a, z_v = (z.float().cpu() for z in extract(model, clips, 8, workers, device, dtype, rank, world))
    if rank == 0:
        base = chance(labels)
        print(f"{path}, {len(clips)} clips of {len(names)} classes ({len(left_out) + len(clips.left_out)} left out), "
              f"{args.clips} clips per file, R@k in %")
        print(f"{'':24}" + "".join(f"{f'R@{k}':>8}" for k in RANKS))
        for level, name in enumerate(("instance", "class")):
            for way, q, g in (("audio -> video", z_a, z_v), ("video -> audio", z_v, z_a)):
                found = recall_at_k(q, g, labels)
                print(f"{name:9}{way:15}" + "".join(f"{100 * found[k][level]:8.1f}" for k in RANKS))
            print(f"{name:9}{'chance':15}" + "".join(f"{100 * base[k][level]:8.1f}" for k in RANKS))


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--checkpoint", default="runs/svaclr/checkpoint.pt", help="of pretrain.py (default runs/svaclr/checkpoint.pt)")
    p.add_argument("--data", help="folder or manifest.csv (default: what the checkpoint was trained on)")
    p.add_argument("--split", default="test", help="the part to search (default test)")
    p.add_argument("--clips", type=int, default=10, help="clips per file, averaged (10; paper silent, GDT)")
    args = p.parse_args()
    device, rank, world = setup()
    try:
        evaluate(args, device, rank, world)
    except ValueError as error:                           # a loading process adds its traceback above the sentence
        if rank == 0 or "\n" in str(error):
            print(f"error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        sys.exit(1)
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
