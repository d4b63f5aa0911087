"""Pictures: the method, affinities as in Fig. 3, training curves, and what sounds retrieve.

    python -m experiments.figures method --out method.png           # of runs/svaclr, its test part
    python -m experiments.figures affinity --out fig3.png
    python -m experiments.figures curves runs/svaclr [RUN ...] --out curves.png
    python -m experiments.figures neighbours --out neighbours.png

`method` shows one clip, its views, the similarities of a small batch with the part that each of
them plays in Eq. 1, and lambda of Eq. 2. `affinity` follows Fig. 3: for some clips a frame, the
spectrograms of the sound at speeds 1, 2 and 4, and under each lam(a, v) with the video at speed 1;
beside it the mean over the test part. The paper does not say over which entries its lam sums to 1
in that figure. Here the softmax runs over the sounds at speeds 1 to 4, so chance is 1/4.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from tqdm import tqdm

from augment import LogMel, crop_at, frame_times, normalize_frames
from data import read_clip
from loss import cross_affinity
from retrieval import extract, load
from support.processes import choose_precision, start

SPEEDS = (1, 2, 3, 4)
TAU_V, TAU_A = (1, 3), (1, 2)                   # of the views in `method`
MARKS = {"positive": "+", "negative": "\N{MINUS SIGN}", "left out": "\N{MULTIPLICATION SIGN}"}


def spread(n, of):
    """n indices spread evenly over range(of)."""
    n = min(n, of)
    return [round(k * (of - 1) / max(1, n - 1)) for k in range(n)]


def role(i, q, j, r):
    """The part that video view r of clip j plays in L[i,p,q] of Eq. 1, for any audio view p."""
    if j != i:
        return "negative"
    return "positive" if r == q else "left out"


@torch.no_grad()
def method(args):
    """One clip -> its views -> the batch's similarities -> lambda."""
    model, settings, clips, _ = load(args)
    model.eval()
    T, fps, size = settings.frames, settings.fps, settings.size
    rows = {row.label: row for row in clips.rows if row.duration >= max(TAU_V + TAU_A) * T / fps}
    rows = [rows[label] for label in sorted(rows)][:4]          # 4 clips of different classes
    if len(rows) < 2:
        raise ValueError(f"the {args.split!r} part has no 2 classes with clips of "
                         f"{max(TAU_V + TAU_A) * T / fps:.1f} s")
    read = [read_clip(row.path, 0, TAU_V, TAU_A, T, fps, size * 8 // 7) for row in rows]
    video = torch.stack([crop_at(frames, size) for frames, _ in read])          # (N, K, T, H, W, 3)
    waves = torch.stack([wave for _, wave in read])                             # (N, K, L)
    audio = LogMel()(waves)                                                     # (N, K, 1, M, F)
    y_a, y_v, z_a, z_v = model(audio, normalize_frames(video))
    s = torch.einsum("ipd,jqd->ipjq", z_a, z_v) / settings.eta                  # (N, K, N, K)
    lam = cross_affinity(y_a, y_v, "clip", settings.affinity_temperature,
                         not settings.raw_affinity)                             # (N, K, K)

    frames, _ = read_clip(rows[0].path, 0, TAU_V, (), T, fps, 128)          # sharper, to look at
    shown = spread(4, T)
    figure = plt.figure(figsize=(11, 4.1), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1.25, 1.1, 0.85), wspace=0.03)
    draw_views(left, crop_at(frames, 128)[:, shown], audio[0], shown, fps)
    draw_similarities(middle, s, len(rows))
    draw_affinity(right, lam[0])
    save(figure, args.out, 90)


def draw_views(figure, frames, audio, shown, fps):
    """Two rows of frames (K, n, H, W, 3) and two spectrograms (K, 1, M, F) of one clip."""
    figure.suptitle("one clip, also sped up: its four views", fontsize=10)
    rows = figure.subfigures(3, 1, height_ratios=(1, 1, 1.15))
    for k, tau in enumerate(TAU_V):
        times = frame_times(shown[-1] + 1, fps, tau)[shown]
        axes = rows[k].subplots(1, len(shown))
        for axis, frame, time in zip(axes, frames[k], times):
            axis.imshow(frame)
            axis.set_xlabel(f"{time:.2f} s", fontsize=7, labelpad=1)
        axes[0].set_ylabel(f"video\n$\\tau_v$ = {tau}", fontsize=8)
        bare(axes)
    axes = rows[2].subplots(1, 2)
    for k, tau in enumerate(TAU_A):
        axes[k].imshow(audio[k, 0], origin="lower", aspect="auto", cmap="magma")
        axes[k].set_xlabel(f"sound, $\\tau_a$ = {tau}", fontsize=8, labelpad=2)
    axes[0].set_ylabel("mel band", fontsize=7)
    bare(axes)


def draw_similarities(figure, s, N):
    """The similarities s (N, K, N, K) as a square, and the parts of one row of it in Eq. 1."""
    figure.suptitle("its batch: $s = z_a \\cdot z_v\\,/\\,\\eta$  (Eq. 1)", fontsize=10)
    K = s.shape[1]
    axis = figure.subplots()
    axis.imshow(s.reshape(N * K, N * K), cmap="Blues")
    i, p, q = 0, 0, 0                           # the row whose parts are marked
    for j in range(N):
        axis.add_patch(Rectangle((K * j - 0.5, K * j - 0.5), K, K, fill=False, edgecolor="#d95f02",
                                 linewidth=2))
        for r in range(K):
            value = (s[i, p, j, r] - s.min()) / (s.max() - s.min())
            axis.text(K * j + r, K * i + p, MARKS[role(i, q, j, r)], ha="center", va="center",
                      fontsize=14, fontweight="bold", color="white" if value > 0.6 else "black")
    axis.add_patch(Rectangle((-0.5, K * i + p - 0.5), N * K, 1, fill=False, edgecolor="black"))
    names = [f"{j + 1}{'′' * k}" for j in range(N) for k in range(K)]
    axis.set_xticks(range(N * K), [f"$v_{{{n}}}$" for n in names], fontsize=8)
    axis.set_yticks(range(N * K), [f"$a_{{{n}}}$" for n in names], fontsize=8)
    axis.tick_params(length=0)
    axis.set_xlabel(f"$a_1$ with $v_1$:  {MARKS['positive']} positive,  {MARKS['negative']} "
                    "negatives (both speeds of other clips),\n"
                    f"{MARKS['left out']} left out (the clip's other speed);  orange: the 2x2 "
                    "pairs of a clip", fontsize=7.5)


def draw_affinity(figure, lam):
    """lambda (K, K) of the clip with its numbers, and Eq. 3."""
    figure.suptitle("its affinity $\\lambda$ (Eq. 2)", fontsize=10)
    axis = figure.subplots()
    axis.imshow(lam, cmap="Oranges", vmin=0, vmax=1)
    for p, line in enumerate(lam.tolist()):
        for q, value in enumerate(line):
            axis.text(q, p, f"{value:.4f}", ha="center", va="center", fontsize=11)
    axis.set_xticks(range(len(TAU_V)), [f"$\\tau_v$ = {tau}" for tau in TAU_V], fontsize=8)
    axis.set_yticks(range(len(TAU_A)), [f"$\\tau_a$ = {tau}" for tau in TAU_A], fontsize=8)
    axis.tick_params(length=0)
    axis.set_xlabel("softmax of $l(y_a)\\,l(y_v)^T$; its sum is 1\n\nloss of a clip (Eq. 3):\n"
                    "$\\sum_{p,q}\\ \\lambda_{p,q}\\ L_{p,q}$", fontsize=9)


def bare(axes):
    """Remove the ticks of all axes."""
    for axis in axes:
        axis.set(xticks=[], yticks=[])


@torch.no_grad()
def affinity(args):
    model, settings, clips, _ = load(args)
    seconds, log_mel, shown, lams = settings.frames / settings.fps, LogMel(), {}, []
    model.eval()
    rows = [row for row in clips.rows
            if row.duration >= max(SPEEDS) * seconds - 0.5 / settings.fps]
    if not rows:
        raise ValueError(f"no clip of the {args.split!r} part lasts {max(SPEEDS) * seconds:.1f} s, "
                         f"as speed {max(SPEEDS)} needs")
    chosen, failed = spread(args.show, len(rows)), 0
    for n, row in enumerate(tqdm(rows, desc="affinities", unit="clip", file=sys.stderr)):
        t0 = max(0, row.duration - max(SPEEDS) * seconds) / 2
        try:
            video, waves = read_clip(row.path, t0, (1,), SPEEDS, settings.frames, settings.fps,
                                     settings.size * 8 // 7)
        except ValueError as error:
            failed += 1
            tqdm.write(f"left out: {error}", file=sys.stderr)
            continue
        video, audio = crop_at(video, settings.size), log_mel(waves)
        y_a = model.l(model.g(audio))                                   # (4, C)
        y_v = model.l(model.f(normalize_frames(video)))                 # (1, C)
        lam = cross_affinity(y_a[None], y_v[None], "clip", settings.affinity_temperature,
                             not settings.raw_affinity)                 # (1, 4, 1)
        lams.append(lam[0, :, 0])
        if n in chosen:
            shown[n] = row.label, video[0, settings.frames // 2], audio[:, 0], lams[-1]
    if not shown:
        raise ValueError("none of the clips to be shown can be read: see the causes above")
    draw_by_speed(list(shown.values()), torch.stack(lams), failed, args.out)


def draw_by_speed(shown, lams, failed, out):
    """Fig. 3 of the clips [(label, frame, spectrograms, lam)], and the mean of lams (n, 4)."""
    figure = plt.figure(figsize=(11, 1.7 * len(shown) + 0.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.4, 1))
    axes = left.subplots(len(shown), 4, squeeze=False)
    for line, (label, frame, audio, lam) in zip(axes, shown):
        line[0].imshow(frame)
        line[0].set_ylabel(label, fontsize=8)
        for axis, k in zip(line[1:], (0, 1, 3)):
            axis.imshow(audio[k], origin="lower", aspect="auto", vmin=-3, vmax=3)
            axis.set_xlabel(f"speed {SPEEDS[k]}: $\\lambda$ = {lam[k]:.3f}", fontsize=8)
    bare(axes.flat)
    mean, deviation = lams.mean(0), lams.std(0)
    axis = right.subplots()
    axis.errorbar(SPEEDS, mean, deviation, marker="o", capsize=4)
    axis.axhline(1 / len(SPEEDS), color="grey", linestyle=":", label="uniform")
    axis.set(xticks=SPEEDS, xlabel="speed of the sound",
             ylabel="$\\lambda$ with the video at speed 1",
             title=f"mean +- deviation, {len(lams)} clips" + f", {failed} failed" * (failed > 0))
    axis.legend()
    save(figure, out)
    print("mean lambda at speeds 1 to 4: "
          + ", ".join(f"{m:.4f} +- {d:.4f}" for m, d in zip(mean, deviation)))


def curves(args):
    """Loss, contrastive top-1 and learning rate of runs, from their log.jsonl."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    for run in args.runs or ["runs/svaclr"]:
        path = Path(run) / "log.jsonl"
        if not path.exists():
            raise ValueError(f"no {path}: give the --out folder of a run of pretrain.py")
        lines = map(json.loads, path.read_text().splitlines())
        events = [line for line in lines if "loss" in line]
        for axis, key in zip(axes, ("loss", "top1", "lr")):
            axis.plot([e["epoch"] for e in events], [e[key] for e in events], label=Path(run).name)
    for axis, title in zip(axes, ("loss (Eq. 3)", "contrastive top-1, speed 1", "learning rate")):
        axis.set(xlabel="epoch", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    save(figure, args.out)


def neighbours(args):
    """For some clips, the top-5 videos that their sound retrieves."""
    model, settings, clips, _ = load(args)
    device = start()
    dtype, _ = choose_precision("auto", device)
    z_a, z_v, rows = extract(model.to(device), clips, dtype)
    nearest = (z_a @ z_v.T).topk(min(5, len(rows))).indices.tolist()            # (n, 5)
    queries = spread(args.show, len(rows))

    def frame(index):
        row = rows[index]
        video, _ = read_clip(row.path, row.duration / 2, (1,), (), 1, settings.fps, 96)
        return crop_at(video, 96)[0, 0]

    figure, axes = plt.subplots(len(queries), 6, figsize=(8, 1.5 * len(queries)), squeeze=False,
                                layout="constrained")
    for line, q in zip(axes, queries):
        for axis, index, place in zip(line, [q, *nearest[q]], range(6)):
            axis.imshow(frame(index))
            right = index == q or rows[index].label == rows[q].label
            title = f"{place}{': its own' if index == q else ''}" if place else "sound of"
            axis.set_title(title, fontsize=8)
            axis.set_xlabel(rows[index].label, fontsize=7, color="black" if right else "red")
    bare(axes.flat)
    save(figure, args.out)


def save(figure, out, dpi=72):
    """Write the picture and print its size."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=dpi)
    plt.close(figure)
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


def parse(argv=None):
    """The arguments of the command line. Bad ones end the command with a sentence and status 2."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("what", choices=["method", "affinity", "curves", "neighbours"])
    p.add_argument("runs", nargs="*", help="curves: --out folders of pretrain.py (runs/svaclr)")
    p.add_argument("--checkpoint", default="runs/svaclr/checkpoint.pt",
                   help="of pretrain.py (runs/svaclr/checkpoint.pt)")
    p.add_argument("--data", help="folder or manifest.csv (default: the training data's)")
    p.add_argument("--split", default="test", help="part to show (test)")
    p.add_argument("--show", type=int, default=4, help="clips to show (4)")
    p.add_argument("--clips", type=int, default=10,
                   help="neighbours: clips of a file, averaged (10; as retrieval.py)")
    p.add_argument("--out", required=True, help="the png to write")
    return p.parse_args(argv)


def main(argv=None):
    """The command. An error becomes one sentence and exit status 1."""
    args = parse(argv)
    try:
        {"method": method, "affinity": affinity, "curves": curves,
         "neighbours": neighbours}[args.what](args)
    except ValueError as error:
        sys.exit(f"error: {str(error).strip().splitlines()[-1]}")


if __name__ == "__main__":
    main()
