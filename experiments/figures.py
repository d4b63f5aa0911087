"""Pictures: affinities as in Fig. 3, what lambda and z have learned, training curves.

    python -m experiments.figures affinity --out fig3.png           # lambda as in Fig. 3
    python -m experiments.figures ratios --out ratios.png           # lambda as in training
    python -m experiments.figures shifts --out shifts.png           # does the model know synchrony?
    python -m experiments.figures curves runs/svaclr [RUN ...] --out curves.png
    python -m experiments.figures links --out links.png             # what speed does to each link

`links` draws the csv files of experiments.ablation with and without --hide. `affinity`, `ratios`
and `shifts` write what they draw to a csv beside the picture.
"""

import argparse
import csv
import json
import statistics
import sys
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from augment import LogMel, centre_crop, normalize_frames
from data import read_clip
from experiments.ablation import COLUMNS, COMPARED, EQUAL, RESULTS, chances, read_csv
from loss import cross_affinity
from prepare.weights import sound_input
from retrieval import load
from support.reading import RATE

SPEEDS = (1, 2, 3, 4)
SHIFTS = [n / 8 for n in range(-8, 9)]          # of the sound in `shifts`, s


def load_with_lambda(args):
    """The model, settings and clips of `load`. Raises ValueError if another model has no lambda."""
    model, settings, clips, _ = load(args)
    if not hasattr(settings, "affinity_temperature"):
        raise ValueError(f"{args.checkpoint} holds weights of {settings.peer}, which has no lambda "
                         "to draw: give a checkpoint.pt of pretrain.py")
    return model.eval(), settings, clips


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
    places = np.linspace(0, len(read) - 1, min(args.show, len(read)))
    shown = [read[n] for n in places.round().astype(int)]

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


def links(args):
    """Retrieval with and without speed at equal epochs, by what sight and sound share.

    A set without a csv was not run, and is left out.
    """
    shared = {"kind, rhythm, timing": "ablation.csv", "rhythm, timing": "ablation-hide-kind.csv",
              "timing": "ablation-hide-kind-rhythm.csv"}
    steps = {name: read_csv(RESULTS / file, COLUMNS) for name, file in shared.items()
             if (RESULTS / file).exists()}                              # {name: lines of the csv}
    by_chance = chances(int(steps["kind, rhythm, timing"][0]["clips"]))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, metric in zip(axes, COMPARED):
        for name in EQUAL:
            values = [[float(line[metric]) for line in lines if line["row"] == name]
                      for lines in steps.values()]
            axis.errorbar([*steps], [*map(statistics.mean, values)],
                          [*map(statistics.stdev, values)], marker="o", capsize=4, label=name)
        axis.axhline(float(by_chance[metric]), color="grey", linestyle=":", label="chance")
        axis.set(title=metric, xlabel="what sight and sound share", ylabel="%", ylim=(0, None))
        axis.margins(x=0.2)
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
    draw = {"affinity": affinity, "ratios": ratios, "shifts": shifts, "curves": curves,
            "links": links}
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
