"""Pictures: affinities as in Fig. 3, training curves, and what speed does to each link.

    python -m experiments.figures affinity --out fig3.png
    python -m experiments.figures curves runs/svaclr [RUN ...] --out curves.png
    python -m experiments.figures links --out links.png

`affinity` writes what it draws to a csv beside the picture. `links` draws the csv files of
experiments.ablation with and without --hide.
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

from augment import LogMel, centre_crop, normalize_frames
from data import read_clip
from experiments.ablation import COLUMNS, COMPARED, EQUAL, RESULTS, chances, read_csv
from loss import cross_affinity
from retrieval import load
from support.commands import errors_in_one_line

SPEEDS = (1, 2, 3, 4)


def affinities(args):
    """Of the middle of each long enough file: (label, frame (H, W, 3), log-mels (4, M, F) and
    lambda (4,) of the sound at SPEEDS with the video at speed 1), a list.

    lambda sums to 1 over the sounds (paper silent). Raises ValueError if no file is long enough, if
    one fails, or if the model has no lambda.
    """
    model, settings, clips, _ = load(args)
    if not hasattr(settings, "affinity_temperature"):
        raise ValueError(f"{args.checkpoint} holds weights of {settings.peer}, which has no lambda "
                         "to draw: give a checkpoint.pt of pretrain.py")
    model.eval()
    log_mel, found, seconds = LogMel(), [], max(SPEEDS) * clips.seconds
    rows = [row for row in clips.rows if row.duration >= seconds - 0.5 / clips.fps]
    if not rows:
        raise ValueError(f"no clip of the {args.split!r} part lasts {seconds:.1f} s, as this "
                         "picture needs")
    for row in tqdm(rows, desc="clips", unit="clip"):
        t0 = row.start + max(0, row.duration - seconds) / 2
        video, waves = read_clip(row.path, t0, (1,), SPEEDS, clips.frames, clips.fps, clips.size,
                                 centre_crop)                           # (1, T, H, W, 3), (4, L)
        audio = log_mel(waves)                                          # (4, 1, M, F)
        ly_a = model.l(model.g(audio))                                  # (4, C)
        ly_v = model.l(model.f(normalize_frames(video)))                # (1, C)
        lam = cross_affinity(ly_a[None], ly_v[None], "clip", settings.affinity_temperature,
                             settings.raw_affinity)                     # (1, 4, 1)
        found.append((row.label, video[0, clips.frames // 2], audio[:, 0], lam[0, :, 0]))
    return found


def affinity(args):
    """Fig. 3: for some clips a frame, the spectrograms of the sound at speeds 1, 2 and 4, and under
    each lam(a, v) with the video at speed 1; beside it the mean over the test part."""
    found = affinities(args)
    places = np.linspace(0, len(found) - 1, min(args.show, len(found)))
    shown = [found[n] for n in places.round().astype(int)]
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
    lams = torch.stack([lam for *_, lam in found])                      # (n, 4)
    mean, deviation = lams.mean(0), lams.std(0)
    axis = right.subplots()
    axis.errorbar(SPEEDS, mean, deviation, marker="o", capsize=4)
    axis.axhline(1 / len(SPEEDS), color="grey", linestyle=":", label="uniform")
    axis.set(xticks=SPEEDS, xlabel="speed of the sound",
             ylabel="$\\lambda$ with the video at speed 1",
             title=f"mean +- deviation, {len(lams)} clips")
    axis.legend()
    save(figure, args.out)
    np.savetxt(Path(args.out).with_suffix(".csv"), np.stack([SPEEDS, mean, deviation], 1), "%.4g",
               ",", header="speed of the sound,lambda,deviation", comments="")


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
    by_chance = chances(int(next(iter(steps.values()))[0]["clips"]))
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


def save(figure, out):
    """Write the picture, and print its size."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=72)
    plt.close(figure)
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


@torch.no_grad()
def main(argv=None):
    """The command. An error becomes one sentence and exit status 1."""
    draw = {"affinity": affinity, "curves": curves, "links": links}
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
    with errors_in_one_line():
        draw[args.what](args)


if __name__ == "__main__":
    main()
