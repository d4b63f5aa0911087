"""Pictures: the method, affinities as in Fig. 3, what lambda and z have learned, training curves.

    python -m experiments.figures method --out method.png           # of runs/svaclr, its test part
    python -m experiments.figures affinity --out fig3.png           # lambda as in Fig. 3
    python -m experiments.figures ratios --out ratios.png           # lambda as in training
    python -m experiments.figures shifts --out shifts.png           # does the model know synchrony?
    python -m experiments.figures curves runs/svaclr [RUN ...] --out curves.png

`affinity`, `ratios` and `shifts` write what they draw to a csv beside the picture.
"""

import argparse
import csv
import json
import sys
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.patches import FancyArrowPatch, Rectangle
from tqdm import tqdm

from augment import LogMel, centre_crop, crop_at, frame_times, normalize_frames
from data import read_clip
from loss import cross_affinity, info_nce, similarities
from prepare.weights import sound_input
from retrieval import load
from support.reading import RATE

SPEEDS = (1, 2, 3, 4)
SHIFTS = [n / 8 for n in range(-8, 9)]          # of the sound in `shifts`, s
TAU_V, TAU_A = (1, 3), (1, 2)                   # of the views in `method`
MARKS = {"positive": "+", "negative": "\N{MINUS SIGN}", "left out": "\N{MULTIPLICATION SIGN}"}
COLOURS = {"positive": "#1a9850", "negative": "#d6403a", "left out": "0.45"}
METHOD_SIZE = 12, 4.9                           # inches, at 100 dpi


def spread(n, of):
    """n indices spread evenly over range(of)."""
    n = min(n, of)
    return [round(k * (of - 1) / max(1, n - 1)) for k in range(n)]


def role(i, q, j, r):
    """The part that video view r of clip j plays in L[i,p,q] of Eq. 1, for any audio view p."""
    if j != i:
        return "negative"
    return "positive" if r == q else "left out"


def load_with_lambda(args):
    """The model, settings and clips of `load`. Raises ValueError if another model has no lambda."""
    model, settings, clips, _ = load(args)
    if not hasattr(settings, "affinity_temperature"):
        raise ValueError(f"{args.checkpoint} holds weights of {settings.peer}, which has no lambda "
                         "to draw: give a checkpoint.pt of pretrain.py")
    return model.eval(), settings, clips


def method(args):
    """One clip, its views, the similarities of a small batch with the part that each of them plays
    in Eq. 1, and how L and lambda make the clip's loss, from sound to video."""
    model, settings, clips = load_with_lambda(args)
    T, fps, size = settings.frames, settings.fps, settings.size
    rows = {row.label: row for row in clips.rows if row.duration >= max(TAU_V + TAU_A) * T / fps}
    rows = [rows[label] for label in sorted(rows)][:4]          # 4 clips of different classes
    if len(rows) < 2:
        raise ValueError(f"the {args.split!r} part has no 2 classes with clips of "
                         f"{max(TAU_V + TAU_A) * T / fps:.1f} s")
    read = [read_clip(row.path, row.start, TAU_V, TAU_A, T, fps, size, centre_crop)
            for row in rows]
    video = torch.stack([frames for frames, _ in read])                         # (N, K, T, H, W, 3)
    audio = LogMel()(torch.stack([wave for _, wave in read]))                   # (N, K, 1, M, F)
    ly_a, ly_v, *z = model(audio, normalize_frames(video))
    z_a, z_v = (F.normalize(x, dim=2) for x in z)                               # (N, K, D) x 2
    own = torch.arange(len(rows))
    s, _ = similarities(z_a, z_v, own, settings.eta)                            # (N, K, N, K)
    L = info_nce(z_a, z_v, own, settings.eta)                                   # (N, K, K)
    lam = cross_affinity(ly_a, ly_v, "clip", settings.affinity_temperature,
                         settings.raw_affinity)                                 # (N, K, K)

    frames, _ = read_clip(rows[0].path, rows[0].video_start, TAU_V, (), T, fps, 128)    # sharper
    canvas = plt.figure(figsize=METHOD_SIZE).add_axes((0, 0, 1, 1))         # its unit is an inch
    canvas.set(xlim=(0, METHOD_SIZE[0]), ylim=(0, METHOD_SIZE[1]))
    canvas.axis("off")
    shown = spread(4, T)
    times = torch.stack([frame_times(T, fps, tau)[shown] for tau in TAU_V])     # (K, n), s
    draw_views(canvas, crop_at(frames, 128)[:, shown], times, audio[0, :, 0], T / fps)
    arrow(canvas, 4.56, 0.42)
    write(canvas, 4.76, 2.86, "$f,\\ h_v$\n$g,\\ h_a$")
    draw_similarities(canvas, s)
    arrow(canvas, 8.64, 0.3)
    draw_loss(canvas, L[0], lam[0])
    save(canvas.figure, args.out, 100)


def place(canvas, x, y, width, height):
    """Axes without ticks whose lower left corner is at x, y."""
    axis = canvas.inset_axes((x, y, width, height), transform=canvas.transData, zorder=0)
    axis.set(xticks=[], yticks=[])
    return axis


def write(canvas, x, y, text, size=10.5, **style):
    """Text around x, y."""
    canvas.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": size} | style)


def arrow(canvas, x, length):
    """An arrow from x to the right, from one part of the figure to the next."""
    canvas.add_patch(FancyArrowPatch((x, 2.55), (x + length, 2.55), color="0.35", linewidth=2,
                                     arrowstyle="-|>", mutation_scale=18))


def mark(canvas, x, y, name):
    """The mark of a role in Eq. 1."""
    circle = dict(boxstyle="circle,pad=0.12", facecolor=COLOURS[name], edgecolor="white")
    write(canvas, x, y, MARKS[name], 12, color="white", fontweight="bold", bbox=circle)


def draw_views(canvas, frames, times, audio, seconds):
    """Frames (K, n, H, W, 3) at times (K, n) and spectrograms (K, M, F) of one clip.

    seconds: what a view at speed 1 covers.
    """
    write(canvas, 2.66, 4.66, "One clip and its four views", 14)
    for k, (tau, y) in enumerate(zip(TAU_V, (3.38, 2.2))):
        write(canvas, 0.42, y + 0.45, f"video $v$\n$\\tau_v$ = {tau}", 11.5)
        for n, frame in enumerate(frames[k]):
            place(canvas, 0.85 + 0.91 * n, y, 0.88, 0.88).imshow(frame)
            write(canvas, 1.29 + 0.91 * n, y - 0.11, f"{times[k, n]:.2f} s")
    write(canvas, 0.42, 1.2, "sound $a$", 11.5)
    for k, tau in enumerate(TAU_A):
        x = 0.85 + 1.84 * k
        place(canvas, x, 0.72, 1.77, 1.15).imshow(audio[k], origin="lower", aspect="auto",
                                                  cmap="magma")
        write(canvas, x, 0.6, "0 s", ha="left")
        write(canvas, x + 0.88, 0.58, f"$\\tau_a$ = {tau}", 11.5)
        write(canvas, x + 1.77, 0.6, f"{tau * seconds:g} s", ha="right")
    write(canvas, 2.66, 0.22, "A view at speed $\\tau$ covers $\\tau$ times the source.", 11)


def draw_similarities(canvas, s):
    """The similarities s (N, K, N, K) as a square, and the roles of one row of it in Eq. 1."""
    N, K = s.shape[:2]
    left, top, side, cell = 5.75, 3.93, 2.8, 2.8 / N / K
    write(canvas, 7.05, 4.66, "Its batch:  $s[i,p,j,q]=z_a\\cdot z_v\\,/\\,\\eta$", 14)
    write(canvas, left + side / 2, top + 0.47, "video view $q$ of clip $j$")
    write(canvas, left - 0.5, top - side / 2, "sound view $p$ of clip $i$", rotation=90)
    axis = place(canvas, left, top - side, side, side)
    axis.imshow(s.reshape(N * K, N * K), cmap="Blues", vmax=1.15 * float(s.max()))
    axis.axis("off")
    for n in range(1, N * K):
        width = 0.7 if n % K else 3
        axis.axhline(n - 0.5, color="white", linewidth=width)
        axis.axvline(n - 0.5, color="white", linewidth=width)
    for j in range(N):
        axis.add_patch(Rectangle((K * j - 0.45, K * j - 0.45), K - 0.1, K - 0.1, fill=False,
                                 edgecolor=COLOURS["positive"], linewidth=2.2, zorder=3))
        middle = cell * K * (j + 0.5)
        write(canvas, left + middle, top + 0.27, f"clip {j}")
        write(canvas, left - 0.27, top - middle, f"clip {j}", rotation=90)
        for r in range(K):
            middle = cell * (K * j + r + 0.5)
            write(canvas, left + middle, top + 0.1, f"{r}", 9.5, color="0.3")
            write(canvas, left - 0.1, top - middle, f"{r}", 9.5, color="0.3")
            mark(canvas, left + middle, top - cell / 2, role(0, 0, j, r))
    for y, name, text in ((0.83, "positive", "positive of $L[0,0,0]$: the clip's video 0"),
                          (0.56, "negative", "negatives: other clips at both speeds"),
                          (0.29, "left out", "left out: the clip's own other view")):
        mark(canvas, 5.4, y, name)
        write(canvas, 5.6, y, text, 11, ha="left")


def draw_loss(canvas, L, lam):
    """L and lambda (K, K) of the first clip with their numbers, and how they make its loss."""
    write(canvas, 10.45, 4.66, "Loss of clip 0", 14)
    draw_pairs(canvas, 9.17, "$L[0,p,q]$", L, ".2f", "Greys")
    draw_pairs(canvas, 10.74, "$\\lambda[0,p,q]$", lam, ".3f", "Oranges")
    total = float((lam * L).sum())
    for y, text in (
            (2.2, "Eq. 1:  $L=-\\log\\ \\dfrac{e^{s_+}}{e^{s_+}+\\ \\sum e^{s_-}}$"),
            (1.64, "Eq. 2:  $\\lambda$ = softmax of $l(y_a)\\,l(y_v)^T$"),
            (1.15, f"Eq. 3:  $\\sum_{{p,q}}\\ \\lambda[0,p,q]\\;L[0,p,q]$ = {total:.2f}"),
            (0.66, "mean over clips, both directions")):
        write(canvas, 9.05, y, text, 11.5, ha="left")


def draw_pairs(canvas, x, name, values, form, colours):
    """The values (K, K) of the pairs of views of one clip."""
    y, side = 2.66, 1.2
    low, mean = float(values.min()), float(values.mean())
    span = max(float(values.max()) - low, 0.1 * mean)           # values that are level look level
    axis = place(canvas, x, y, side, side)
    axis.imshow(values, cmap=colours, vmin=low - 0.3 * span, vmax=low + 2 * span)
    axis.axhline(0.5, color="white")
    axis.axvline(0.5, color="white")
    plt.setp(axis.spines.values(), edgecolor=COLOURS["positive"], linewidth=2.2)
    write(canvas, x + side / 2, y + side + 0.4, name, 12.5)
    for n in range(2):
        middle = side * (0.25 + 0.5 * n)
        write(canvas, x + middle, y + side + 0.13, f"$\\tau_v$ = {TAU_V[n]}", 10)
        write(canvas, x - 0.06, y + side - middle, f"$\\tau_a$ = {TAU_A[n]}", 10, rotation=90,
              ha="right")
        for q in range(2):
            axis.text(q, n, f"{values[n, q]:{form}}", ha="center", va="center", fontsize=12)


def views(clips, split, tau_v, tau_a, more=0):
    """Yield (row, video (K, T, H, W, 3), waves (K, L)) from the middle of each long enough file.

    T and L have `more` s than a clip. Raises ValueError if no file is long enough, or if one fails.
    """
    seconds, frames = max(tau_v + tau_a) * clips.seconds + more, clips.frames + more * clips.fps
    rows = [row for row in clips.rows if row.duration >= seconds - 0.5 / clips.fps]
    if not rows:
        raise ValueError(f"no clip of the {split!r} part lasts {seconds:.1f} s, as this picture "
                         "needs")
    for row in tqdm(rows, desc="clips", unit="clip"):
        t0 = row.start + max(0, row.duration - seconds) / 2
        yield row, *read_clip(row.path, t0, tau_v, tau_a, frames, clips.fps, clips.size,
                              centre_crop)


def ratios(args):
    """The lambda of training, the 2 x 2 softmax of Eq. 2, by the ratio of both speeds."""
    model, settings, clips = load_with_lambda(args)
    lams = lambda_by_speeds(model, settings, clips, args.split)         # (n, 4, 4)
    mean, deviation = lams.mean(0), lams.std(0)
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for n, tau_v in enumerate(SPEEDS):
        x = [tau_a / tau_v for tau_a in SPEEDS]
        axis.errorbar(x, mean[:, n], deviation[:, n], marker="o", capsize=3,
                      label=f"$\\tau_v$ = {tau_v}")
    axis.axhline(0.25, color="grey", linestyle=":", label="even share")
    axis.set(xscale="log", xlabel="$\\tau_a / \\tau_v$", ylabel="$\\lambda$ of both faster views",
             title=f"2 x 2 softmax of Eq. 2, mean +- deviation, {len(lams)} clips")
    axis.set_xticks([1 / 4, 1 / 2, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    axis.minorticks_off()
    axis.legend()
    tau_a, tau_v = zip(*product(SPEEDS, SPEEDS))
    save(figure, args.out, 100, {"tau_a": tau_a, "tau_v": tau_v, "lambda": mean.flatten(),
                                 "deviation": deviation.flatten()})


def lambda_by_speeds(model, settings, clips, split):
    """(n, 4, 4): for tau_a by tau_v, the lambda of the pair of both faster views of a clip.

    As in training, view 0 has speed 1, and the softmax of Eq. 2 runs over the 2 x 2 pairs.
    """
    log_mel, lams = LogMel(), []
    pairs = torch.tensor([[(0, p), (0, q)] for p in range(4) for q in range(4)])    # (16, 2, 2)
    for _, video, waves in views(clips, split, SPEEDS, SPEEDS):
        ly_a = model.l(model.g(log_mel(waves)))                                     # (4, C)
        ly_v = model.l(model.f(normalize_frames(video)))                            # (4, C)
        lam = cross_affinity(ly_a[pairs[:, 0]], ly_v[pairs[:, 1]], "clip",
                             settings.affinity_temperature, settings.raw_affinity)  # (16, 2, 2)
        lams.append(lam[:, 1, 1].view(4, 4))
    return torch.stack(lams)


def shifts(args):
    """z_a . z_v against a shift of the sound, for a clip's own sound and for those of others.

    It shows whether the model knows synchrony.
    """
    model, settings, clips, _ = load(args)
    own, others = similarity_by_shift(model.eval(), sound_input(settings.sound), clips, args.split)
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    columns = {"shift, s": SHIFTS}
    for name, s in (("sound of the same file", own), ("sounds of other files", others)):
        mean, error = s.mean(0), s.std(0) / len(s) ** 0.5
        axis.errorbar(SHIFTS, mean, error, marker="o", capsize=3, label=name)
        columns |= {name: mean, f"{name}, standard error": error}
    axis.set(xlabel="the sound begins later than the pictures by, s", ylabel="$z_a \\cdot z_v$",
             title=f"clips at speed 1, mean +- standard error, {len(own)} clips")
    axis.legend()
    save(figure, args.out, 100, columns)


def similarity_by_shift(model, log_mel, clips, split):
    """z_a . z_v of each clip's pictures with shifted sounds: two (n, len(SHIFTS)).

    The first is with the sound of the same file, the second the mean over those of other files.
    """
    T, fps, L = clips.frames, clips.fps, round(RATE * clips.seconds)
    z_a, z_v = [], []
    for _, video, waves in views(clips, split, (1,), (1,), more=2):
        starts = [round(RATE * (1 + shift)) for shift in SHIFTS]
        shifted = torch.stack([waves[0, start:start + L] for start in starts])          # (S, L)
        z_a.append(F.normalize(model.h_a(model.g(log_mel(shifted))), dim=1))            # (S, D)
        z_v.append(F.normalize(model.h_v(model.f(normalize_frames(video[:, fps:fps + T]))), dim=1))
    s = torch.einsum("ijd,nsd->ins", torch.stack(z_v), torch.stack(z_a))                # (n, n, S)
    own = s[range(len(s)), range(len(s))]                                               # (n, S)
    return own, (s.sum(1) - own) / (len(s) - 1)


def affinity(args):
    """Fig. 3: for some clips a frame, the spectrograms of the sound at speeds 1, 2 and 4, and under
    each lam(a, v) with the video at speed 1; beside it the mean over the test part.

    lam sums to 1 over the sounds at speeds 1 to 4 (paper silent).
    """
    model, settings, clips = load_with_lambda(args)
    log_mel, read = LogMel(), []                    # (label, frame, spectrograms, lambda) of a clip
    for row, video, waves in views(clips, args.split, (1,), SPEEDS):
        audio = log_mel(waves)                                          # (4, 1, M, F)
        ly_a = model.l(model.g(audio))                                  # (4, C)
        ly_v = model.l(model.f(normalize_frames(video)))                # (1, C)
        lam = cross_affinity(ly_a[None], ly_v[None], "clip", settings.affinity_temperature,
                             settings.raw_affinity)                     # (1, 4, 1)
        read.append((row.label, video[0, settings.frames // 2], audio[:, 0], lam[0, :, 0]))
    shown = [read[n] for n in spread(args.show, len(read))]

    figure = plt.figure(figsize=(11, 1.7 * len(shown) + 0.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.4, 1))
    axes = left.subplots(len(shown), 4, squeeze=False)
    for line, (label, frame, audio, lam) in zip(axes, shown):
        line[0].imshow(frame)
        line[0].set_ylabel(label, fontsize=8)
        for axis, k in zip(line[1:], (0, 1, 3)):
            axis.imshow(audio[k], origin="lower", aspect="auto", vmin=-3, vmax=3)
            axis.set_xlabel(f"speed {SPEEDS[k]}: $\\lambda$ = {lam[k]:.3f}", fontsize=8)
    plt.setp(axes.flat, xticks=[], yticks=[])
    lams = torch.stack([lam for *_, lam in read])                       # (n, 4)
    mean, deviation = lams.mean(0), lams.std(0)
    axis = right.subplots()
    axis.errorbar(SPEEDS, mean, deviation, marker="o", capsize=4)
    axis.axhline(1 / len(SPEEDS), color="grey", linestyle=":", label="uniform")
    axis.set(xticks=SPEEDS, xlabel="speed of the sound",
             ylabel="$\\lambda$ with the video at speed 1",
             title=f"mean +- deviation, {len(lams)} clips")
    axis.legend()
    save(figure, args.out, columns={"speed of the sound": SPEEDS, "lambda": mean,
                                    "deviation": deviation})


def curves(args):
    """Loss, contrastive top-1 and learning rate of runs, from their log.jsonl."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    for run in args.runs or ["runs/svaclr"]:
        lines = map(json.loads, (Path(run) / "log.jsonl").read_text().splitlines())
        events = [line for line in lines if "loss" in line]
        for axis, key in zip(axes, ("loss", "top1", "lr")):
            axis.plot([e["epoch"] for e in events], [e[key] for e in events], label=Path(run).name)
    for axis, title in zip(axes, ("loss (Eq. 3)", "contrastive top-1, speed 1", "learning rate")):
        axis.set(xlabel="epoch", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    save(figure, args.out)


def save(figure, out, dpi=72, columns=None):
    """Write the picture, print its size, and write the columns {name: numbers} to a csv beside."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=dpi)
    plt.close(figure)
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")
    if columns:
        with open(out.with_suffix(".csv"), "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows([f"{x:.4g}" for x in line] for line in zip(*columns.values()))


@torch.no_grad()
def main(argv=None):
    """The command. An error becomes one sentence and exit status 1."""
    draw = {"method": method, "affinity": affinity, "ratios": ratios, "shifts": shifts,
            "curves": curves}
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("what", choices=list(draw))
    p.add_argument("runs", nargs="*", help="curves: --out folders of pretrain.py (runs/svaclr)")
    p.add_argument("--checkpoint", default="runs/svaclr/checkpoint.pt",
                   help="of pretrain.py (runs/svaclr/checkpoint.pt)")
    p.add_argument("--data", help="folder or manifest.csv (default: the training data's)")
    p.add_argument("--split", default="test", help="part to show (test)")
    p.add_argument("--show", type=int, default=4, help="clips to show (4)")
    p.add_argument("--out", required=True, help="the png to write")
    p.set_defaults(clips=1)                     # of a file, for `load`; none of them is read
    args = p.parse_args(argv)
    try:
        draw[args.what](args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {str(error).strip().splitlines()[-1]}")


if __name__ == "__main__":
    main()
