"""Action recognition (§3.1, Table 2): fine-tuning on UCF101 and HMDB51 by GDT's protocol.

    python finetune.py                                  # the built-in set, after python pretrain.py
    python finetune.py --data ucf101-{fold}.csv --fold 1 2 3 \\
        --checkpoint runs/k400/checkpoint.pt --out runs/ucf101
    torchrun --nproc_per_node=8 finetune.py --data hmdb51-{fold}.csv --fold 1 2 3 \\
        --checkpoint runs/k400/checkpoint.pt --out runs/hmdb51

With --data the defaults are the protocol's; without it they are those of the built-in set. A help
text names both, and the section, or GDT where the paper is silent. Ctrl-C saves, and the same
command continues. The result is that of the last epoch. OUT gets results.json, checkpoint.pt,
log.jsonl, confusion.csv (rows: the true class) and classes.csv. With --fold the folder OUT/fold1
(2, 3) gets these, and OUT the results.json of several folds, with their mean. Folds may also be
trained by commands of their own: one with all of them then evaluates, and takes the mean.

Symbols: n videos, B clips of this process's batch, T frames, H, W pixels, C encoder width.
"""

import argparse
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from augment import normalize_frames
from data import ActionClips, find_rows, make_loader
from models import ARCHS, C, video_encoder
from support.batches import evaluation_batches, gather_results
from support.checkpoints import checksum, load_encoder, say_torchvision
from support.classification import (check_protocol, fit_linear, predictions, print_results,
                                    shared_classes, subset, top_1_and_5, write_classes,
                                    write_results)
from support.commands import add_run_flags, at_least, fraction, positive
from support.launch import launch
from support.layers import prepare_layers
from support.precision import autocast, choose_precision
from support.processes import say, world_size
from support.run import Run, lock_folder

# The built-in set is seen as in pretraining, in fewer clips, so that two CPU cores take minutes.
DEMO = dict(arch="r2plus1d_10", size=32, frames=4, fps=4, train_clips=2, test_clips=4)


def parse(argv=None):
    """The arguments of the command line. Bad ones end the script with a sentence and status 2."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    data = p.add_argument_group("data and encoder")
    data.add_argument("--data", help="folder ROOT/{train,test}/class/*.mp4, or manifest.csv; "
                      "{fold} in it stands for each --fold (default: the built-in set)")
    data.add_argument("--fold", type=int, nargs="+", choices=(1, 2, 3), help="folds to use (none)")
    data.add_argument("--fraction", type=fraction, default=1.0,
                      help="share of each class's training videos, at least one video (1; all)")
    data.add_argument("--checkpoint", default="runs/svaclr/checkpoint.pt",
                      help="checkpoint.pt or video_encoder.pt of pretrain.py, torchvision's file, "
                      "torchvision (Kinetics-400 labels), or none (runs/svaclr/checkpoint.pt)")
    data.add_argument("--arch", choices=ARCHS, default="r2plus1d_18",
                      help="video encoder f (r2plus1d_18: §2.3; built-in set: r2plus1d_10)")
    data.add_argument("--out", default="runs/finetune", help="folder of results (runs/finetune)")
    clip = p.add_argument_group("clips")
    clip.add_argument("--frames", type=at_least(1), default=32,
                      help="T, frames of a clip (32: paper silent, GDT; built-in set: 4)")
    clip.add_argument("--fps", type=at_least(1), default=30,
                      help="frames per s (30: paper silent, GDT; built-in set: 4)")
    clip.add_argument("--size", type=at_least(16), default=128,
                      help="H = W in pixels (128: Table 2, which has 224 too; built-in set: 32)")
    clip.add_argument("--train-clips", type=at_least(1), default=10,
                      help="random clips of a video in an epoch; with --linear its evenly spaced "
                      "clips (10: GDT; built-in set: 2)")
    clip.add_argument("--test-clips", type=at_least(1), default=10,
                      help="clips of a test video, each in 3 crops (10: GDT; built-in set: 4)")
    optim = p.add_argument_group("optimisation")
    optim.add_argument("--linear", action="store_true",
                       help="fit a linear classifier on the frozen encoder; of this group and the "
                       "next it reads --seed, --precision, --workers and --max-failures (off)")
    optim.add_argument("--epochs", type=at_least(1), default=12, help="epochs (12: §3.1)")
    optim.add_argument("--global-batch", type=at_least(1), default=32,
                       help="clips over all processes (32; paper silent, GDT)")
    optim.add_argument("--lr", type=positive, default=2e-2,
                       help="peak rate of the head; the trunk has a tenth (2e-2: §3.1; tenth: GDT)")
    optim.add_argument("--weight-decay", type=at_least(0, float), default=5e-3,
                       help="of SGD (5e-3; GDT)")
    add_run_flags(p)
    if p.parse_args(argv).data is None:
        p.set_defaults(**DEMO)
    args = p.parse_args(argv)
    if bool(args.fold) != ("{fold}" in (args.data or "")):
        p.error("--fold and a {fold} in --data need each other: --data ucf101-{fold}.csv --fold 1")
    return args


def learning_rates(epoch, epochs, peak):
    """Learning rates (head, trunk) at a fractional epoch (§3.1; the trunk's tenth: GDT).

    Of 12 epochs the head's rate rises from peak / 8 to peak in 2, and falls to 0.05 of itself at
    epochs 6 and 10. Other lengths keep these proportions.
    """
    epoch = epoch * 12 / epochs
    warming = peak / 8 + (peak - peak / 8) * epoch / 2
    head = warming if epoch < 2 else peak * 0.05 ** ((epoch >= 6) + (epoch >= 10))
    return head, head / 10


def classifier(encoder, classes):
    """(n, 3, T, H, W) -> (n, classes): f, and a linear head with orthogonal first weights (GDT)."""
    head = nn.Linear(C, classes)
    nn.init.orthogonal_(head.weight)
    nn.init.zeros_(head.bias)
    model = nn.Sequential(OrderedDict(f=encoder, head=head))
    return model.to(memory_format=torch.channels_last_3d)


def train(args, model, clips, dtype):
    """§3.1: train all layers by SGD, the head at ten times the rate of the trunk."""
    device = next(model.parameters()).device
    if len(clips) < args.global_batch:
        raise ValueError(f"{len(clips)} training clips do not fill a batch of {args.global_batch}: "
                         "give a smaller --global-batch")
    loader = make_loader(clips, args.global_batch // world_size(), args.workers, args.epochs)
    model = prepare_layers(model, device)
    groups = [{"params": model.head.parameters()}, {"params": model.f.parameters()}]
    optimizer = torch.optim.SGD(groups, args.lr, momentum=0.9, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    net = DistributedDataParallel(model) if world_size() > 1 else model

    B, steps = loader.batch_sampler.batch_size, loader.batch_sampler.steps_per_epoch
    head, trunk = learning_rates(args.epochs / 6, args.epochs, args.lr)         # the peaks
    say(f"global batch {args.global_batch} = {world_size()} process(es) x {B} clips, {steps} steps "
        f"an epoch, {args.epochs * steps} steps in all; learning rate up to {head:g} of the head "
        f"and {trunk:g} of the trunk")
    run = Run(args, loader, model, optimizer, scaler,
              {"processes": world_size(), "clips": len(clips)})
    for epoch, (frames, labels) in run:             # (B, T, H, W, 3) uint8, (B,)
        lr = learning_rates(epoch, args.epochs, args.lr)
        for group, group_lr in zip(optimizer.param_groups, lr):
            group["lr"] = group_lr
        with autocast(device, dtype):
            logits = net(normalize_frames(frames)).float()              # (B, classes)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        run.log(loss=loss, top1=(logits.argmax(1) == labels).float().mean(), lr=lr[0])


@torch.no_grad()
def features(f, clips, dtype, workers, max_failures):
    """Yield (index, label, y (clips * crops, C)) for each video of this process that can be read.

    Raises ValueError if more than the share `max_failures` fail.
    """
    f.eval()
    device = next(f.parameters()).device
    for frames, label, (index,) in evaluation_batches(make_loader(clips, 1, workers), max_failures):
        with autocast(device, dtype):
            y = f(normalize_frames(frames[0].to(device)))               # (clips * crops, C)
        yield index, label.item(), y.float()


@torch.no_grad()
def evaluate(model, clips, dtype, workers=None, max_failures=0.05):
    """The test of §3.1 (GDT): average the softmax over a video's clips and crops.

    Returns scores (n, classes), hits (n, 2), and the n rows of the videos that could be read. hits
    has the share of a video's clips and crops whose own top 1 and top 5 have the label.
    """
    found = {}
    for index, label, y in features(model.f, clips, dtype, workers, max_failures):
        logits = model.head(y)                                          # (clips * crops, classes)
        hits = top_1_and_5(logits, label).mean(0)                       # (2,)
        found[index] = torch.cat([logits.softmax(1).mean(0), hits])
    results, read = gather_results(found, "scores")                     # (n, classes + 2)
    return results[:, :-2], results[:, -2:], [clips.rows[n] for n in read]


def linear_probe(encoder, clips, args, dtype):
    """The linear classifier on the frozen encoder's features, and how many videos failed."""
    device = next(encoder.parameters()).device
    found = {index: y for index, _, y
             in features(encoder, clips, dtype, args.workers, args.max_failures)}
    y, read = gather_results(found, "features")                         # (n, clips, C)
    labels = torch.tensor([clips.classes.index(clips.rows[n].label) for n in read])     # (n,)
    if len(labels.unique()) < len(clips.classes):
        raise ValueError("all training videos of a class failed: mend or replace those named above")
    labels = labels.repeat_interleave(clips.clips_per_file)             # (n clips,)
    linear = fit_linear(y.flatten(0, 1).to(device), labels.to(device))
    return linear, len(clips) - len(read)


def one_fold(args, device):
    """Train on the train part of the data, test on its test part: {name: accuracy in %}."""
    lock_folder(args.out, None if args.linear else args)
    if args.global_batch % world_size() and not args.linear:
        raise ValueError(f"--global-batch {args.global_batch} does not divide among {world_size()} "
                         f"processes: start another number, or give a multiple of {world_size()}")
    torch.manual_seed(args.seed)
    encoder = load_encoder(args.checkpoint, video_encoder(args.arch), args.arch)
    train_rows, train_left_out = find_rows(args.data, "train", args.out)
    test_rows, test_left_out = find_rows(args.data, "test", args.out)
    train_rows = subset(train_rows, args.fraction, args.seed)
    classes = shared_classes(args.data, train_rows, test_rows)
    args.encoder = checksum(encoder)                    # no run continues with another encoder
    model = classifier(encoder, len(classes)).to(device)
    dtype, reason = choose_precision(args.precision, device)
    clip = dict(frames=args.frames, fps=args.fps, size=args.size, seed=args.seed)
    say(f"{world_size()} process(es) on {device.type}, {str(dtype)[6:]} ({reason}); clips of "
        f"{args.frames} frames of {args.size} pixels, {args.fps} per s; {len(train_rows)} training "
        f"and {len(test_rows)} test videos of {len(classes)} classes, {len(train_left_out)} and "
        f"{len(test_left_out)} left out; encoder from {args.checkpoint}")
    say_torchvision(args.checkpoint, args.frames, args.fps, args.size)
    failed = {}
    if args.linear:
        clips = ActionClips(train_rows, classes, **clip, clips_per_file=args.train_clips)
        model.head, failures = linear_probe(encoder, clips, args, dtype)
        failed = {"failed in training": failures}
        say(f"{failures} of {len(train_rows)} training videos failed")
    else:
        args.classes = classes                          # for experiments.predict
        train(args, model, ActionClips(train_rows * args.train_clips, classes, **clip), dtype)
    clips = ActionClips(test_rows, classes, **clip, clips_per_file=args.test_clips, crops=3)
    scores, hits, rows = evaluate(model, clips, dtype, args.workers, args.max_failures)
    labels = torch.tensor([classes.index(row.label) for row in rows])   # (n,)
    write_classes(Path(args.out), classes, labels, predictions(scores, labels))
    shares = torch.cat([top_1_and_5(scores, labels), hits], 1).double().mean(0)         # (4,)
    names = "video top-1", "video top-5", "clip top-1", "clip top-5"
    return {**dict(zip(names, (100 * shares).tolist())), "test videos": len(rows),
            "classes": len(classes), "failed": len(clips) - len(rows), **failed}


def recognise(args, device):
    """Train and test on the folds, write the results of each, and their mean if there are more."""
    runs = [argparse.Namespace(**vars(args) | {
        "fold": fold, "data": args.data.replace("{fold}", str(fold)),
        "out": str(Path(args.out, f"fold{fold}"))}) for fold in args.fold or ()] or [args]
    for run in (args, *runs):
        check_protocol(run)
    for run in runs:                    # before hours of training
        if run.fold and not Path(run.data).exists():
            raise ValueError(f"--data {run.data}: no such manifest or folder")
    folds = {}
    for run in runs:
        result = {f"fold {run.fold}" if run.fold else "test": one_fold(run, device)}
        write_results(run, result)
        folds |= result
    if len(folds) > 1:
        write_results(args, folds)
    print_results(args if len(folds) > 1 else run, folds)


if __name__ == "__main__":
    launch(recognise, parse())
