"""Action recognition (§3.1, Table 2): fine-tuning on UCF101 and HMDB51 by GDT's protocol, and the linear probe.

    python finetune.py                                                      # the built-in set, after python pretrain.py
    python finetune.py --data ucf101-{fold}.csv --fold 1 2 3 --checkpoint runs/k400/checkpoint.pt --out runs/ucf101
    torchrun --nproc_per_node=8 finetune.py --data hmdb51-{fold}.csv --fold 1 2 3 --checkpoint runs/k400/checkpoint.pt \\
        --out runs/hmdb51

Defaults are the protocol's; help texts name the section, or GDT where the paper is silent. The result is that of the
last epoch, and the mean over folds. OUT gets results.json, and for each fold checkpoint.pt (the same command again goes
on from it), log.jsonl, confusion.csv (rows: the true class) and classes.csv.

n videos, B clips of a batch, T frames, H, W pixels, C encoder width.
"""

import argparse
import csv
import json
import statistics
import zlib
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from augment import normalize_frames
from data import ActionClips, evaluation_batches, make_loader
from models import C, load_encoder
from pretrain import fit, loading_workers, precision, rows_of, run, running_flags

# For the built-in set: as pretrain.py saw it, and fewer clips, so that two CPU cores take minutes.
DEMO = dict(arch="r2plus1d_10", size=32, frames=4, fps=4, train_clips=2, test_clips=4)


def parse(argv=None):
    """The arguments, argv's or the command line's. Exits with status 2 and a sentence where they do not fit."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--data", help="folder ROOT/{train,test}/class/*.mp4, or manifest.csv with both parts; {fold} in its "
                   "name stands for each of --fold (default: the built-in set)")
    p.add_argument("--fold", type=int, nargs="+", choices=(1, 2, 3), help="official folds, e.g. 1 2 3 for their mean "
                   "(default: --data as it is)")
    p.add_argument("--checkpoint", default="runs/svaclr/checkpoint.pt", help="checkpoint.pt or video_encoder.pt of "
                   "pretrain.py, torchvision's file, torchvision (Kinetics-400 labels), or none (default runs/svaclr/checkpoint.pt)")
    p.add_argument("--out", default="runs/finetune", help="folder of the results (default runs/finetune)")
    p.add_argument("--arch", default="r2plus1d_18", choices=["r2plus1d_18", "r3d_18", "r2plus1d_10"],
                   help="video encoder f (r2plus1d_18: §2.3)")
    p.add_argument("--linear", action="store_true", help="fit a linear classifier on the frozen encoder "
                   "instead; what the optimiser and checkpoints need is then unread (default: fine-tune)")
    p.add_argument("--fraction", type=float, default=1.0, help="of each class's training videos, one or more (1.0)")
    p.add_argument("--frames", type=int, default=32, help="T (32; paper silent, GDT)")
    p.add_argument("--fps", type=int, default=30, help="frames per second (30; paper silent, GDT)")
    p.add_argument("--size", type=int, default=128, help="H = W in pixels (128: Table 2; 224 there too)")
    p.add_argument("--train-clips", type=int, default=10, help="random clips per video and epoch (10; GDT)")
    p.add_argument("--test-clips", type=int, default=10, help="evenly spaced clips per test video, 3 crops each (10; GDT)")
    p.add_argument("--epochs", type=int, default=12, help="(12: §3.1); the learning rate's steps keep their share of them")
    p.add_argument("--batch-size", type=int, default=32, help="clips in all, over all processes (32: §3.1)")
    p.add_argument("--lr", type=float, default=2e-2, help="peak of the head; the trunk has a tenth (2e-2: §3.1; tenth: GDT)")
    p.add_argument("--weight-decay", type=float, default=5e-3, help="(5e-3; paper silent, GDT)")
    running_flags(p)
    if p.parse_args(argv).data is None:
        p.set_defaults(**DEMO)
    args = p.parse_args(argv)
    for name, low in dict(frames=1, fps=1, size=16, train_clips=1, test_clips=1, epochs=1, batch_size=1).items():
        if getattr(args, name) < low:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: {low} or more")
    if not 0 < args.fraction <= 1:
        p.error(f"--fraction {args.fraction}: more than 0, at most 1")
    if not 0 <= args.max_failures < 1:
        p.error(f"--max-failures {args.max_failures}: 0 or more, less than 1")
    if args.fold and "{fold}" not in (args.data or ""):
        p.error("--fold needs a --data with {fold} in its name, e.g. --data ucf101-{fold}.csv")
    if "{fold}" in (args.data or "") and not args.fold:
        p.error(f"--data {args.data} needs --fold, e.g. --fold 1 2 3")
    return args


def lr_at(epoch, epochs, peak):
    """Learning rates (head, trunk) at a fractional epoch of 12 (§3.1; the trunk's tenth: GDT): the head's goes from
    peak / 8 to peak in 2 epochs, then times 0.05 at epoch 6 and again at 10. Other lengths keep the proportions."""
    epoch = epoch * 12 / epochs
    head = peak / 8 + (peak - peak / 8) * epoch / 2 if epoch < 2 else peak * 0.05 ** ((epoch >= 6) + (epoch >= 10))
    return head, head / 10


def classifier(encoder, classes):
    """(n, 3, T, H, W) -> (n, classes): f, and a linear head with orthogonal weights and no bias at first (GDT)."""
    head = nn.Linear(C, classes)
    nn.init.orthogonal_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(OrderedDict(f=encoder, head=head))


def part(rows, fraction, seed):
    """The share `fraction` of each class's rows, one or more, drawn by seed; a smaller share lies within a greater."""
    groups = {}
    for row in rows:
        groups.setdefault(row.label, []).append(row)
    kept = []
    for label in sorted(groups):
        order = np.random.default_rng([seed, *label.encode()]).permutation(len(groups[label]))
        kept += [groups[label][n] for n in sorted(order[:max(1, round(fraction * len(order)))])]
    return kept


@torch.no_grad()
def features(f, clips, device, dtype, workers, rank, world, max_failures):
    """(index, label, y (clips * crops, C)) of each video of this process that can be read, one
    video in memory at a time. ValueError where more than the share `max_failures` of all cannot."""
    f.eval()
    for frames, label, (index,) in evaluation_batches(clips, 1, loading_workers(workers), rank,
                                                      world, max_failures):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            y = f(normalize_frames(frames[0].to(device)))                           # (clips * crops, C)
        yield index, label.item(), y.float()


@torch.no_grad()
def evaluate(model, clips, device, dtype, workers=None, rank=0, world=1, max_failures=0.05):
    """Test of §3.1 (GDT): scores (n, classes), the softmax averaged over a video's clips and crops, and hits (n, 2),
    the share of these whose own top 1 and top 5 have the label. Kept by index: no video counts
    twice. Third, the n rows of `clips` that could be read; ValueError where more than the share
    `max_failures` could not."""
    results = torch.zeros(len(clips), len(clips.classes) + 3, device=device)    # last: was read
    for index, label, y in features(model.f, clips, device, dtype, workers, rank, world,
                                    max_failures):
        logits = model.head(y)                                                      # (clips * crops, classes)
        best = logits.topk(min(5, logits.shape[1])).indices == label                # (clips * crops, 5)
        results[index] = torch.cat([logits.softmax(1).mean(0), best[:, :1].float().mean(0, True)[0],
                                    best.any(1).float().mean(0, True), y.new_ones(1)])
    if world > 1:
        dist.all_reduce(results)                          # every index is filled by one process, zero on the others
    if not torch.isfinite(results).all():
        raise ValueError("scores are not finite: the training has diverged, try a lower --lr")
    kept = results[:, -1].nonzero().flatten().tolist()
    results = results[kept].cpu()                         # (n, classes + 3)
    return results[:, :-3], results[:, -3:-1], [clips.rows[n] for n in kept]


def fit_linear(x, labels, decay=1e-3):
    """Softmax regression of features x (n, C) on labels (n,): the nn.Linear that minimises cross-entropy plus decay / 2
    times the squared weights, on standardised features, by L-BFGS; no learning rate to choose (this project's)."""
    mean, std = x.mean(0), x.std(0) + 1e-6                                          # (C,) x 2
    z = (x - mean) / std                                                            # (n, C)
    linear = nn.Linear(x.shape[1], int(labels.max()) + 1, device=x.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(z), labels) + decay / 2 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():                                 # from standardised features back to x
        linear.weight /= std
        linear.bias -= linear.weight @ mean
    return linear.requires_grad_(False)


def one_fold(args, data, out, device, rank, world):
    """Train on the train part of `data`, test on its test part: {name: accuracy in %}. Raises ValueError."""
    say = print if rank == 0 else lambda *_: None
    out.mkdir(parents=True, exist_ok=True)
    rows = {split: rows_of(data, split, out, rank, world) for split in ("train", "test")}
    train, test = (part(rows["train"][0], args.fraction, args.seed), rows["test"][0])
    if any(row.split == "" for row in train + test):
        raise ValueError(f"--data {data} has no train and test parts (its split column is empty): make its manifest from "
                         "the official lists, or put the files under ROOT/train and ROOT/test")
    classes = sorted({row.label for row in train})
    strange = sorted({row.label for row in test} - set(classes))
    if strange:
        raise ValueError(f"--data {data}: {len(strange)} of the test part's classes are not in its train part: "
                         f"{', '.join(strange[:5])}; both need the same")
    if not test or len(classes) < 2:
        raise ValueError(f"--data {data} has {len(test)} usable test videos and {len(classes)} classes to train: 1 and 2 "
                         "or more are needed")
    torch.manual_seed(args.seed)
    encoder = load_encoder(args.checkpoint, args.arch).to(device, memory_format=torch.channels_last_3d)
    model, (dtype, why) = classifier(encoder, len(classes)).to(device), precision(args.precision, device)
    clip = dict(frames=args.frames, fps=args.fps, size=args.size, seed=args.seed)
    say(f"{world} process(es) on {device.type}, {str(dtype)[6:]} ({why}); {len(train)} training and {len(test)} test videos "
        f"of {len(classes)} classes, {len(rows['train'][1])} and {len(rows['test'][1])} left out; encoder from {args.checkpoint}")
    unread = {}
    if args.linear:
        clips = ActionClips(train, classes, **clip, clips=args.train_clips, crops=1)
        x = torch.zeros(len(train), args.train_clips, C, device=device)             # (n, clips, C)
        labels = torch.full((len(train),), -1, device=device)                       # (n,), or -1
        for index, label, y in features(encoder, clips, device, dtype, args.workers, rank, world,
                                        args.max_failures):
            x[index], labels[index] = y, label
        if world > 1:
            dist.all_reduce(x)
            dist.all_reduce(labels, dist.ReduceOp.MAX)
        x, labels = x[labels >= 0], labels[labels >= 0]
        if len(labels.unique()) < len(classes):
            raise ValueError("all training videos of a class failed: mend or replace those named above")
        unread = {"failed in training": len(train) - len(x)}
        if len(x) < len(train):
            say(f"{len(train) - len(x)} of {len(train)} training videos failed")
        model.head = fit_linear(x.flatten(0, 1), labels.repeat_interleave(args.train_clips))
    else:
        weights = b"".join(x.cpu().numpy().tobytes() for x in encoder.state_dict().values())
        args.encoder = f"{zlib.crc32(weights):08x}"       # so that a run is not continued with another encoder
        fine_tune(args, model, ActionClips(train * args.train_clips, classes, **clip), out, dtype, rank, world)
    test = ActionClips(test, classes, **clip, clips=args.test_clips)
    scores, hits, read = evaluate(model, test, device, dtype, args.workers, rank, world,
                                  args.max_failures)      # (n, classes), (n, 2), n rows
    labels = torch.tensor([classes.index(row.label) for row in read])               # (n,)
    best = scores.topk(min(5, len(classes))).indices == labels[:, None]             # (n, 5)
    if rank == 0:
        write_classes(out, classes, labels, scores.argmax(1))
    return {"video top-1": 100 * best[:, 0].double().mean().item(), "video top-5": 100 * best.any(1).double().mean().item(),
            "clip top-1": 100 * hits[:, 0].double().mean().item(), "clip top-5": 100 * hits[:, 1].double().mean().item(),
            "test videos": len(labels), "classes": len(classes),
            "failed": len(test) - len(labels), **unread}


def fine_tune(args, model, clips, out, dtype, rank, world):
    """§3.1: all layers by SGD, the head at ten times the rate of the trunk. Raises what pretrain.fit raises."""
    device = next(model.parameters()).device
    if args.batch_size % world:
        raise ValueError(f"--batch-size {args.batch_size} does not divide among {world} processes: give a multiple of {world}")
    loader = make_loader(clips, args.batch_size // world, loading_workers(args.workers), rank, world)
    if len(loader) == 0:
        raise ValueError(f"{len(clips)} training clips do not fill a batch of {args.batch_size}: give a smaller --batch-size")
    if device.type == "cuda" and world > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.SGD([{"params": model.head.parameters()}, {"params": model.f.parameters()}], lr=args.lr,
                                momentum=0.9, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    net = DistributedDataParallel(model) if world > 1 else model

    def forward(frames, labels):                          # (B, T, H, W, 3) uint8, (B,)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = net(normalize_frames(frames)).float()                          # (B, classes)
        return F.cross_entropy(logits, labels), lambda: (logits.argmax(1) == labels).float().mean()

    fit(out / "checkpoint.pt", args, {"processes": world, "clips": len(clips)}, loader, model, optimizer, scaler,
        lambda epoch: lr_at(epoch, args.epochs, args.lr), forward, rank, world)


def write_classes(out, classes, labels, answers):
    """confusion.csv: rows the true class, columns the answer; classes.csv: videos, correct ones, accuracy of each class."""
    counts = torch.zeros(len(classes), len(classes), dtype=torch.int64)             # (true class, answer)
    counts.index_put_((labels, answers), torch.tensor(1), accumulate=True)
    for name, head, lines in (
            ("confusion.csv", ["", *classes], [[c, *row] for c, row in zip(classes, counts.tolist())]),
            ("classes.csv", ["class", "videos", "correct", "accuracy"],
             [[c, sum(row), row[n], f"{row[n] / max(1, sum(row)):.4f}"] for n, (c, row) in enumerate(zip(classes, counts.tolist()))])):
        with open(out / name, "w", newline="") as file:
            csv.writer(file).writerows([head, *lines])


def recognise(args, device, rank, world):
    """All folds, and results.json. Raises what `run` names."""
    out, folds = Path(args.out), {}
    for fold in args.fold or [None]:
        data = args.data.replace("{fold}", str(fold)) if fold else args.data
        here = out / f"fold{fold}" if fold else out
        folds[f"fold {fold}" if fold else "test"] = one_fold(Namespace(**vars(args) | {"fold": fold}), data, here, device, rank, world)
    names = [name for name in next(iter(folds.values())) if "top" in name]
    mean = {name: statistics.mean(result[name] for result in folds.values()) for name in names}
    if rank == 0:
        (out / "results.json").write_text(json.dumps({"protocol": vars(args), "epoch": "last", **folds, "mean": mean}, indent=1))
        for name, result in [*folds.items(), ("mean", mean)] if len(folds) > 1 else folds.items():
            m, n = result.get("failed", 0), result.get("test videos", 0)
            print(f"{name}: " + ", ".join(f"{key} {x:.1f} %" if "top" in key else f"{x} {key}"
                                          for key, x in result.items() if "failed" not in key)
                  + f", {m} of {m + n} test videos failed" * (m > 0))
        print(f"({'linear probe' if args.linear else f'epoch {args.epochs} of {args.epochs}'}, {args.test_clips} clips x 3 crops; "
              f"{out}/results.json)")


def main():
    """The command."""
    run(recognise, parse())


if __name__ == "__main__":
    main()
