"""Pictures: Fig. 3's affinities, training curves, and what sounds retrieve.

    python -m experiments.figures affinity --out fig3.png                 # of runs/svaclr on its test part
    python -m experiments.figures curves runs/svaclr [RUN ...] --out curves.png
    python -m experiments.figures neighbours --out neighbours.png

`affinity` follows Fig. 3: for some clips a frame, the spectrograms of the sound at speeds 1, 2 and 4, and under each
lam(a, v) with the video at speed 1; beside it the mean over the whole test part. The paper does not say over what its
lam sums to 1 there; here Eq. 2's softmax runs over the sounds that are compared, at speeds 1 to 4, so chance is 1/4.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from augment import LogMel, crop_at, normalize_frames
from data import read_clip
from loss import cross_affinity
from pretrain import loading_workers, precision, setup
from retrieval import extract, load

SPEEDS = (1, 2, 3, 4)


def spread(n, of):
    """n indices spread evenly over range(of)."""
    n = min(n, of)
    return [round(k * (of - 1) / max(1, n - 1)) for k in range(n)]


@torch.no_grad()
def affinity(args):
    model, then, clips, _ = load(args)
    seconds, log_mel, shown, lams = then.frames / then.fps, LogMel(), {}, []
    model.eval()
    rows = [row for row in clips.rows if row.duration >= max(SPEEDS) * seconds - 0.5 / then.fps]
    if not rows:
        raise ValueError(f"no clip of the {args.split!r} part lasts {max(SPEEDS) * seconds:.1f} s, as speed {max(SPEEDS)} needs")
    chosen = spread(args.show, len(rows))
    for n, row in enumerate(tqdm(rows, desc="affinities", unit="clip", file=sys.stderr)):
        t0 = max(0, row.duration - max(SPEEDS) * seconds) / 2
        video, waves = read_clip(row.path, t0, (1,), SPEEDS, then.frames, then.fps, then.size * 8 // 7)
        video, audio = crop_at(video, then.size), log_mel(waves)                    # (1, T, H, W, 3), (4, 1, M, F)
        y_v, y_a = model.l(model.f(normalize_frames(video))), model.l(model.g(audio))       # (1, C), (4, C)
        lams.append(cross_affinity(y_a[None], y_v[None], "clip", then.affinity_temperature, not then.raw_affinity)[0, :, 0])
        if n in chosen:
            shown[n] = row.label, video[0, then.frames // 2], audio[:, 0], lams[-1]
    lams = torch.stack(lams)                                                        # (n, 4)

    figure = plt.figure(figsize=(11, 1.7 * len(shown) + 0.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.4, 1))
    axes = left.subplots(len(shown), 4, squeeze=False)
    for line, (label, frame, audio, lam) in zip(axes, shown.values()):
        line[0].imshow(frame)
        line[0].set_ylabel(label, fontsize=8)
        for axis, k in zip(line[1:], (0, 1, 3)):
            axis.imshow(audio[k], origin="lower", aspect="auto", vmin=-3, vmax=3)
            axis.set_xlabel(f"speed {SPEEDS[k]}: $\\lambda$ = {lam[k]:.3f}", fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axis = right.subplots()
    axis.errorbar(SPEEDS, lams.mean(0), lams.std(0), marker="o", capsize=4)
    axis.axhline(1 / len(SPEEDS), color="grey", linestyle=":", label="uniform")
    axis.set(xticks=SPEEDS, xlabel="speed of the sound", ylabel="$\\lambda$ with the video at speed 1",
             title=f"mean +- deviation, {len(lams)} clips")
    axis.legend()
    save(figure, args.out)
    print("mean lambda at speeds 1 to 4: " + ", ".join(f"{m:.4f} +- {d:.4f}" for m, d in zip(lams.mean(0), lams.std(0))))


def curves(args):
    """Loss, contrastive top-1 and learning rate of runs, from their log.jsonl."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    for run in args.runs or ["runs/svaclr"]:
        path = Path(run) / "log.jsonl"
        if not path.exists():
            raise ValueError(f"no {path}: give the --out folder of a run of pretrain.py")
        events = [event for event in map(json.loads, path.read_text().splitlines()) if "loss" in event]
        for axis, key in zip(axes, ("loss", "top1", "lr")):
            axis.plot([e["epoch"] for e in events], [e[key] for e in events], label=Path(run).name)
    for axis, title in zip(axes, ("loss (Eq. 3)", "contrastive top-1, speed 1", "learning rate")):
        axis.set(xlabel="epoch", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    save(figure, args.out)


def neighbours(args):
    """For some clips, the top-5 videos that their sound retrieves."""
    model, then, clips, _ = load(args)
    device, _, _ = setup()
    dtype, _ = precision("auto", device)
    z_a, z_v, rows = extract(model.to(device), clips, 8, loading_workers(), device, dtype)
    nearest = (z_a @ z_v.T).topk(min(5, len(rows))).indices.tolist()                # (n, 5)
    queries = spread(args.show, len(rows))

    def frame(index):
        row = rows[index]
        video, _ = read_clip(row.path, row.duration / 2, (1,), (), 1, then.fps, 96)
        return crop_at(video, 96)[0, 0]

    figure, axes = plt.subplots(len(queries), 6, figsize=(8, 1.5 * len(queries)), squeeze=False, layout="constrained")
    for line, q in zip(axes, queries):
        for axis, index, rank in zip(line, [q, *nearest[q]], range(6)):
            axis.imshow(frame(index))
            right = index == q or rows[index].label == rows[q].label
            axis.set_title("sound of" if rank == 0 else f"{rank}{': its own' if index == q else ''}", fontsize=8)
            axis.set_xlabel(rows[index].label, fontsize=7, color="black" if right else "red")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    save(figure, args.out)


def save(figure, out):
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=72)
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("what", choices=["affinity", "curves", "neighbours"])
    p.add_argument("runs", nargs="*", help="curves: --out folders of pretrain.py (default runs/svaclr)")
    p.add_argument("--checkpoint", default="runs/svaclr/checkpoint.pt", help="(default runs/svaclr/checkpoint.pt)")
    p.add_argument("--data", help="folder or manifest.csv (default: what the checkpoint was trained on)")
    p.add_argument("--split", default="test", help="the part to show (default test)")
    p.add_argument("--show", type=int, default=4, help="clips to show (default 4)")
    p.add_argument("--clips", type=int, default=10, help="neighbours: clips per file, averaged (10; as retrieval.py)")
    p.add_argument("--out", required=True, help="the png to write")
    args = p.parse_args()
    try:
        {"affinity": affinity, "curves": curves, "neighbours": neighbours}[args.what](args)
    except ValueError as error:
        sys.exit(f"error: {str(error).strip().splitlines()[-1]}")
