"""SvaCLR pre-training (§2.3, §3.1 of arXiv 2309.13942): speed co-augmentation and SoftInfoNCE.

    python pretrain.py                                  # the built-in set: minutes on a CPU
    python pretrain.py --data k400.csv --out runs/k400 --batch-per-process 512 --chunk 8
    torchrun --nproc_per_node=8 pretrain.py --data k400.csv --out runs/k400 \\
        --batch-per-process 64 --chunk 8

The last two train on one GPU and on eight, with the paper's batch of 512. With --data the defaults
are the paper's; without it they are those of the built-in set. Each help text gives both defaults
and their source: a section of the paper, or GDT where the paper is silent. The same command
continues an interrupted run; Ctrl-C saves and ends it with status 130, SIGTERM and SIGUSR1 with 75
(docs/running.md). OUT gets checkpoint.pt, log.jsonl (the settings, then a line every 10 steps),
manifest.csv (of a folder), and at the end video_encoder.pt and audio_encoder.pt, which have
torchvision's names.

Symbols: B clips of this process, N clips of the global batch, K views, T frames, H, W pixels,
L samples, M mel bands, F spectrogram frames, C encoder width, D projection width.
"""

import argparse
import math
import sys
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from augment import LogMel, normalize_frames
from data import AudioVisualClips, find_rows, make_loader
from loss import all_gather, double_sum, positions, soft_info_nce
from models import ARCHS, SvaCLR
from support.checkpoints import load_audio_encoder, load_encoder
from support.commands import add_run_flags, at_least, positive
from support.launch import launch
from support.layers import prepare_layers
from support.precision import autocast, choose_precision
from support.processes import say, world_size
from support.run import Run, lock_folder

PAPER_BATCH = 512           # §3.1: 64 GPUs x 8 clips, the batch to which its learning rates belong
# The built-in set has small frames and a small encoder, so that two CPU cores train it in minutes.
# Its processes share a global batch of 32 clips, so they make as many steps as one process.
DEMO = dict(arch="r2plus1d_10", size=32, frames=4, fps=4, epochs=15, batch_per_process=None)
DEMO_BATCH = 32


def parse(argv=None):
    """The arguments of the command line. Bad ones end the script with a sentence and status 2."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    data = p.add_argument_group("data")
    data.add_argument("--data", help="folder ROOT/[train|val|test/]class/*.mp4, or manifest.csv "
                      "(default: the built-in set, made in the folder demo beside --out)")
    data.add_argument("--split", default="train", help="part to train on (train; our choice)")
    data.add_argument("--out", default="runs/svaclr", help="folder of the results (runs/svaclr)")
    clip = p.add_argument_group("clips (§2.1)")
    clip.add_argument("--max-speed", type=at_least(1), default=4,
                      help="S, speeds are drawn from {1, ..., S}; 1: no co-augmentation (4: "
                      "Table 1)")
    clip.add_argument("--same-speed", action="store_true",
                      help="one drawn speed for video and sound alike (default: independent ones, "
                      "§2.1; SpeedAug, the paper's first version, speaks of one)")
    clip.add_argument("--frames", type=at_least(1), default=30,
                      help="T, frames of a view (30: paper silent, GDT; built-in set: 4)")
    clip.add_argument("--fps", type=at_least(1), default=30,
                      help="frames per s at speed 1 (30: paper silent, GDT; built-in set: 4)")
    clip.add_argument("--size", type=at_least(16), default=128,
                      help="H = W in pixels (128: Table 2, which has 224 too; built-in set: 32)")
    add_training_flags(p)
    add_run_flags(p).add_argument("--compile", action="store_true", help="torch.compile (off)")
    if p.parse_args(argv).data is None:
        p.set_defaults(**DEMO)
    args = p.parse_args(argv)
    args.warmup = args.epochs / 10 if args.warmup is None else args.warmup
    if args.warmup > args.epochs:
        p.error(f"--warmup {args.warmup} is longer than --epochs {args.epochs}")
    if args.same_speed and args.max_speed == 1:
        p.error("--same-speed has no speed to draw: it needs --max-speed above 1")
    if args.mapping != "identity" and (args.detach_affinity or args.affinity == "none" or
                                       args.max_speed == 1 and args.affinity != "batch"):
        p.error(f"--mapping {args.mapping} has nothing to learn from: it needs --affinity batch, "
                "or clip or view with --max-speed above 1, and no --detach-affinity")
    return args


def add_training_flags(p):
    """Add the flags of §2.2, §2.3 and §3.1 to a parser."""
    model = p.add_argument_group("model and objective (Eq. 1 to 3)")
    model.add_argument("--arch", default="r2plus1d_18", choices=ARCHS,
                       help="video encoder f (r2plus1d_18: §2.3; built-in set: r2plus1d_10)")
    model.add_argument("--init", help="checkpoint.pt, video_encoder.pt, torchvision's file or "
                       "torchvision: first weights of f, and of g if the file has them (random; "
                       "our choice)")
    model.add_argument("--affinity", default="clip", choices=["none", "clip", "view", "batch"],
                       help="scope of the softmax in Eq. 2 (clip: §2.2); none: InfoNCE; batch: the "
                       "double sum of Eq. 3 read literally")
    model.add_argument("--mapping", default="identity", choices=["identity", "linear", "mlp"],
                       help="l of Eq. 2 (identity: §2.2)")
    model.add_argument("--affinity-temperature", type=positive, default=1.0,
                       help="temperature of the softmax in Eq. 2 (1; paper silent, SNCLR)")
    model.add_argument("--raw-affinity", action="store_true",
                       help="y as it is in Eq. 2 (default: unit length; paper silent, SNCLR)")
    model.add_argument("--detach-affinity", action="store_true",
                       help="no gradient through lambda (default: as printed in Eq. 3)")
    model.add_argument("--one-way", action="store_true",
                       help="audio -> video alone, as printed (default: mean of both directions)")
    model.add_argument("--eta", type=positive, default=0.07,
                       help="temperature of Eq. 1 (0.07; paper silent, GDT)")
    optim = p.add_argument_group("optimisation (§3.1)")
    optim.add_argument("--epochs", type=at_least(1), default=100,
                       help="passes over the data (100: §3.1; built-in set: 15)")
    optim.add_argument("--warmup", type=at_least(0, float),
                       help="epochs of linear warm-up (a tenth of --epochs; 10 of 100: §3.1)")
    optim.add_argument("--batch-per-process", type=at_least(1), default=8,
                       help="clips per process (8: §3.1, on 64 GPUs; 8 GPUs make the same 512 by "
                       "64, with --chunk; built-in set: all processes share 32)")
    optim.add_argument("--chunk", type=at_least(2),
                       help="embed this many clips at a time; negatives still come from the whole "
                       "batch, BatchNorm's statistics from one chunk (default: all clips of a "
                       "process; paper silent)")
    optim.add_argument("--lr", type=positive, default=0.64,
                       help="peak at a global batch of 512 (0.64: §3.1), from a tenth to 0.10/0.64 "
                       "of it; all three are scaled by the global batch over 512")
    optim.add_argument("--weight-decay", type=at_least(0, float), default=1e-5,
                       help="of SGD, on all weights (1e-5; paper silent, GDT)")


def learning_rate(epoch, warmup, epochs, peak):
    """§3.1: linear from peak / 10 to peak in `warmup` epochs, then cosine to peak * 0.10 / 0.64.

    epoch is fractional, so the rate moves at each step.
    """
    first, last = peak / 10, peak * 0.10 / 0.64
    if epoch < warmup:
        return first + (peak - first) * epoch / warmup
    progress = (epoch - warmup) / (epochs - warmup) if epochs > warmup else 1
    return last + (peak - last) * (1 + math.cos(math.pi * progress)) / 2


def clips_per_process(args):
    """B: --batch-per-process or, on the built-in set, an equal share of its global batch of 32.

    Raises ValueError if 32 clips, or the clips of a process in chunks, do not divide evenly.
    """
    B = args.batch_per_process or DEMO_BATCH // world_size()
    if not args.batch_per_process and DEMO_BATCH % world_size():
        raise ValueError(f"the built-in set's global batch of {DEMO_BATCH} clips does not divide "
                         f"among {world_size()} processes: start 1, 2, 4, 8, 16 or 32 of them, or "
                         "give --batch-per-process")
    if args.chunk and B % args.chunk:
        raise ValueError(f"--chunk {args.chunk} does not divide the {B} clips of a process: give "
                         "a divisor of it")
    return B


def build(args, device, dtype):
    """The model, with the same weights on all processes, its optimiser and its gradient scaler."""
    torch.manual_seed(args.seed)
    model = SvaCLR(args.arch, args.mapping)
    if args.init and not Path(args.out, "checkpoint.pt").exists():      # a run that begins
        load_encoder(args.init, model.f, args.arch)
        heard = load_audio_encoder(args.init, model.g)
        say(f"first weights of {'f and g' if heard else 'f'} from {args.init}")
    model.to(device)
    model.f.to(memory_format=torch.channels_last_3d)
    model.g.to(memory_format=torch.channels_last)
    model = prepare_layers(model, device)
    # Fused SGD leaves its momentum uninitialised if the first float16 step is skipped.
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9,
                                weight_decay=args.weight_decay, fused=dtype != torch.float16)
    return model, optimizer, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


@torch.no_grad()
def top1(z_a, z_v):
    """Accuracy at speed 1: the share of local sounds whose nearest video is their own."""
    z_a, z_v = (normalize(z[:, 0].float(), dim=1) for z in (z_a, z_v))  # (B, D) x 2
    s = z_a @ all_gather(z_v).T                                         # (B, N)
    return (s.argmax(1) == positions(z_a)).float().mean()


def step_in_chunks(embed, objective, net, scaler, batch, n):
    """Eq. 3 and its gradient over the whole batch, with the memory of one of n chunks of it.

    dloss/dtheta is the sum over the chunks of dloss/d(ly, z) d(ly, z)/dtheta, and the first factor
    needs ly and z alone. So each chunk is embedded twice, by embed(*chunk) -> ly_a, ly_v, z_a, z_v
    (gradient caching, arXiv 2101.06983). Chunk k has clips k, k + n, ..., as the k-th of n
    processes would.
    Returns the loss, and z_a and z_v (B, K, D), chunk after chunk.
    """
    chunks = [[x[k::n] for x in batch] for k in range(n)]               # n times (B / n, ...)
    with torch.no_grad():
        statistics = [x.clone() for x in net.buffers()]     # BatchNorm's, which move once a chunk
        ly_z = [torch.cat(x) for x in zip(*(embed(*chunk) for chunk in chunks))]    # 4 (B, K, ...)
        for x, before in zip(net.buffers(), statistics):
            x.copy_(before)
    loss = objective(*(x.requires_grad_() for x in ly_z))               # Eq. 3
    # dloss/d(ly, z), in the shapes of ly_z
    gradients = torch.autograd.grad(scaler.scale(loss), ly_z, materialize_grads=True)
    for k, chunk in enumerate(chunks):
        # With the last chunk the processes sum up their gradients.
        with net.no_sync() if world_size() > 1 and k < n - 1 else nullcontext():
            torch.autograd.backward(embed(*chunk), [g.chunk(n)[k] for g in gradients])
    return loss, *ly_z[2:]


def find_clips(args, B):
    """§3.1: the batches of all epochs, and {path: reason} of the files that are left out."""
    names = "arch", "size", "frames", "fps", "epochs", "warmup", "max_speed", "affinity"
    source = "No --data: training on the built-in set" if args.data is None else args.data
    say(f"{source}, with " + ", ".join(f"{name} {getattr(args, name)}" for name in names))
    rows, left_out = find_rows(args.data, args.split, args.out)
    clips = AudioVisualClips(rows, args.frames, args.fps, args.size, args.max_speed,
                             args.same_speed, args.seed)
    left_out |= clips.left_out
    say_left_out(left_out)
    if short := sum(clips.fitting_speed(row) < args.max_speed for row in clips.rows):
        say(f"{short} of {len(clips)} clips are too short for --max-speed {args.max_speed}: they "
            "draw from the speeds that fit")
    loader = make_loader(clips, B, args.workers, args.epochs)
    if loader.batch_sampler.steps_per_epoch == 0:
        raise ValueError(f"{len(clips)} usable clips ({len(left_out)} left out) do not fill one "
                         f"global batch of {B * world_size()}: give a smaller --batch-per-process "
                         "or more data")
    return loader, left_out


def say_left_out(left_out):
    """Print up to ten of the files that are left out, and how many there are for each reason."""
    for path, reason in list(left_out.items())[:10]:
        say(f"left out: {path}: {reason}")
    if len(left_out) > 10:
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(left_out.values()).items())
        say(f"... and {len(left_out) - 10} more: {reasons}")


def say_settings(args, B, loader, left_out):
    """Print the effective numbers of a run: batch, negatives, steps and learning rate."""
    N, K = world_size() * B, loader.dataset.K
    steps = loader.batch_sampler.steps_per_epoch
    rates = [learning_rate(epoch, args.warmup, args.epochs, args.lr * N / PAPER_BATCH)
             for epoch in (0, args.warmup, args.epochs)]
    chunks = f" in chunks of {args.chunk}" if args.chunk else ""
    say(f"{len(loader.dataset)} clips ({len(left_out)} left out), global batch {N} = "
        f"{world_size()} process(es) x {B} clips{chunks}, {K} view(s): {K * (N - 1)} negatives per "
        f"query, {steps} steps an epoch, {args.epochs * steps} steps in all")
    say(f"{loader.num_workers} loading worker(s) for each process")
    say(f"learning rate {' -> '.join(f'{rate:.4g}' for rate in rates)} "
        f"({args.lr:g} for a batch of 512, times {N}/512)")


def train(args, device):
    """§3.1: read the data, build the model, train it with Eq. 3, save it."""
    B = clips_per_process(args)
    N = B * world_size()
    lock_folder(args.out, args)
    dtype, reason = choose_precision(args.precision, device)
    model, optimizer, scaler = build(args, device, dtype)       # refuses a bad --init before a scan
    say(f"{world_size()} process(es) on {device.type}, {str(dtype)[6:]} ({reason}), "
        f"{torch.get_num_threads()} thread(s) each")
    if device.type == "cpu" and args.arch != DEMO["arch"]:
        say("warning: no GPU is used. On a CPU the paper's settings take 20 GB and minutes for a "
            "step: for smaller ones see One CPU in docs/running.md", sys.stderr)
    loader, left_out = find_clips(args, B)
    say_settings(args, B, loader, left_out)
    net = torch.compile(model) if args.compile else model
    net = DistributedDataParallel(net) if world_size() > 1 else net
    log_mel = LogMel().to(device)

    def embed(frames, waves):                       # (B, K, T, H, W, 3) uint8, (B, K, L)
        audio = log_mel(waves)                      # (B, K, 1, M, F)
        video = normalize_frames(frames)            # (B, K, 3, T, H, W)
        with autocast(device, dtype):
            return net(audio, video)                # ly_a, ly_v (B, K, C), z_a, z_v (B, K, D)

    eq_3 = (double_sum if args.affinity == "batch" else
            partial(soft_info_nce, affinity=args.affinity))
    objective = partial(                            # without check: the run names files with NaN
        eq_3, eta=args.eta, affinity_temperature=args.affinity_temperature, check=False,
        raw_affinity=args.raw_affinity, detach_affinity=args.detach_affinity, one_way=args.one_way)
    run = Run(args, loader, model, optimizer, scaler, {
        "processes": world_size(), "precision": str(dtype)[6:], "torch": torch.__version__,
        "clips": len(loader.dataset), "left_out": Counter(left_out.values())})
    n = B // (args.chunk or B)                      # chunks
    for epoch, (frames, waves) in run:
        lr = learning_rate(epoch, args.warmup, args.epochs, args.lr * N / PAPER_BATCH)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        if n > 1:
            loss, z_a, z_v = step_in_chunks(embed, objective, net, scaler, (frames, waves), n)
        else:
            ly_a, ly_v, z_a, z_v = embed(frames, waves)
            loss = objective(ly_a, ly_v, z_a, z_v)  # Eq. 3
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        run.log(loss=loss, top1=top1(z_a, z_v), lr=lr)

    run.write(model.f.state_dict(), "video_encoder.pt")
    run.write(model.g.state_dict(), "audio_encoder.pt")
    say(f"done: {args.out}/checkpoint.pt, video_encoder.pt, audio_encoder.pt")


if __name__ == "__main__":
    launch(train, parse())
