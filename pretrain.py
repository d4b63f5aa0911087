"""SvaCLR pre-training (§2.3, §3.1 of arXiv 2309.13942): speed co-augmentation and SoftInfoNCE.

    python pretrain.py                                                      # CPU or GPU, the built-in set, minutes
    python pretrain.py --data kinetics --out runs/k400                      # one GPU
    torchrun --nproc_per_node=8 pretrain.py --data kinetics --out runs/k400 # 8 GPUs (or as many CPU processes)

Defaults are the paper's; help texts name the section, or GDT where the paper is silent and its code base decides.
The same command again continues an interrupted run, at the step of its last checkpoint. SIGTERM and SIGUSR1 save one
and exit with status 75. OUT gets checkpoint.pt (everything), log.jsonl (the arguments, then one line per log event),
manifest.csv, and at the end video_encoder.pt and audio_encoder.pt (torchvision's names).
"""

import argparse
import io
import json
import math
import os
import signal
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from augment import LogMel, normalize_frames
from data import AudioVisualClips, TooManyFailures, make_loader, read_manifest
from loss import all_gather, soft_info_nce
from models import SvaCLR, read_state
from prepare import demo, scan

PAPER_BATCH = 512                                         # §3.1: 64 GPUs x 8, the batch its learning rates belong to
LOG_EVERY = 10                                            # steps
REQUEUE = 75                                              # exit status after a signal: EX_TEMPFAIL of sysexits.h
UNSHARED = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"           # makes torchrun's restarts start with a store of their own
FREE = {"out", "workers", "save_every", "compile", "max_failures", "test_clips"}    # settings that a resumed run may change
# For the built-in set: small frames and a small encoder, so that two CPU cores train it in minutes.
DEMO = dict(arch="r2plus1d_10", size=32, frames=4, fps=4, batch_size=32, epochs=15, warmup=1)


def parse(argv=None):
    """The arguments, argv's or the command line's. Exits with status 2 and a sentence where they do not fit."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    data = p.add_argument_group("data")
    data.add_argument("--data", help="folder ROOT/[train|val|test/]class/*.mp4, or manifest.csv (default: the built-in set)")
    data.add_argument("--split", default="train", help="the part to train on, where the data has parts (default train)")
    data.add_argument("--out", default="runs/svaclr", help="folder of the results (default runs/svaclr)")
    clip = p.add_argument_group("clips")
    clip.add_argument("--max-speed", type=int, default=4, help="S of T = {1..S}; 1: no co-augmentation (4: Table 1)")
    clip.add_argument("--frames", type=int, default=30, help="T (30; paper silent, GDT)")
    clip.add_argument("--fps", type=int, default=30, help="frames per second at speed 1 (30; paper silent, GDT)")
    clip.add_argument("--size", type=int, default=128, help="H = W in pixels (128: Table 2; 224 there too)")
    model = p.add_argument_group("model and objective")
    model.add_argument("--arch", default="r2plus1d_18", choices=["r2plus1d_18", "r3d_18", "r2plus1d_10"],
                       help="video encoder f (r2plus1d_18: §2.3; r2plus1d_10 is for CPUs)")
    model.add_argument("--affinity", default="clip", choices=["none", "clip", "view", "batch"],
                       help="scope of Eq. 2's softmax (clip: §2.2's 2x2); none: InfoNCE")
    model.add_argument("--mapping", default="identity", choices=["identity", "linear", "mlp"], help="l of Eq. 2 (§2.2)")
    model.add_argument("--affinity-temperature", type=float, default=1.0, help="of Eq. 2's softmax (1; paper silent, SNCLR)")
    model.add_argument("--raw-affinity", action="store_true", help="y as it is in Eq. 2 (default: unit length; paper "
                       "silent, SNCLR)")
    model.add_argument("--detach-affinity", action="store_true", help="no gradient through lam (default: as printed)")
    model.add_argument("--one-way", action="store_true", help="audio -> video alone, as printed (default: both ways)")
    model.add_argument("--eta", type=float, default=0.07, help="temperature of Eq. 1 (0.07; paper silent, GDT)")
    optim = p.add_argument_group("optimisation")
    optim.add_argument("--epochs", type=int, default=100, help="in all (100: §3.1)")
    optim.add_argument("--warmup", type=int, default=10, help="epochs of linear warm-up (10: §3.1)")
    optim.add_argument("--batch-size", type=int, default=8, help="clips per process (8: §3.1)")
    optim.add_argument("--lr", type=float, default=0.64, help="peak learning rate at a global batch of 512 (0.64: §3.1); "
                       "start and end keep the paper's 0.064 : 0.64 : 0.10, and all scale with the global batch")
    optim.add_argument("--weight-decay", type=float, default=1e-5, help="(1e-5; paper silent, GDT)")
    running_flags(p).add_argument("--compile", action="store_true", help="torch.compile the model (default off)")
    if p.parse_args(argv).data is None:
        p.set_defaults(**DEMO)
    args = p.parse_args(argv)
    for name, low in dict(max_speed=1, frames=1, fps=1, size=16, epochs=1, warmup=0, batch_size=1, workers=0).items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: {low} or more")
    for name in ("eta", "affinity_temperature", "lr"):
        if not getattr(args, name) > 0:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: more than 0")
    if args.warmup > args.epochs:
        p.error(f"--warmup {args.warmup} is longer than --epochs {args.epochs}")
    if args.mapping != "identity" and (args.detach_affinity or args.affinity == "none" or args.max_speed == 1):
        p.error(f"--mapping {args.mapping} has nothing to learn from here: it needs --affinity clip, view or batch, "
                "--max-speed over 1, and no --detach-affinity")
    return args


def running_flags(p):
    """Add the flags of any run that trains to the parser. Returns their group."""
    run = p.add_argument_group("running")
    run.add_argument("--seed", type=int, default=0, help="of weights, order and draws (0)")
    run.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
                     help="(default auto: bf16 where the hardware has it, fp16 on older GPUs, else fp32)")
    run.add_argument("--workers", type=int, default=None, help="loading processes per process (default: the cores "
                     "per process but one, at most 8)")
    run.add_argument("--max-failures", type=float, default=0.05, help="share of clips that may "
                     "fail to be read, replaced in training and left out in a test; more stop it "
                     "(0.05; this project's)")
    run.add_argument("--save-every", type=float, default=10, help="minutes between checkpoints (10)")
    return run


def setup():
    """device, rank, world: torchrun's environment decides; without it, one process and no group."""
    local, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        if local >= torch.cuda.device_count():
            sys.exit(f"error: process {local} of this machine has no GPU of its own, there are {torch.cuda.device_count()}: "
                     "start that many, or none with CUDA_VISIBLE_DEVICES=")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    else:                                                 # share the cores out among this machine's processes
        torch.set_num_threads(cores_per_process())
    if world > 1:
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and UNSHARED not in os.environ and os.environ["RANK"] == "0":
            print(f"warning: torchrun --max-restarts needs {UNSHARED}=1 set before it, else restarted workers look for the "
                  "dead ones (pytorch/pytorch#135712)", file=sys.stderr)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return device, int(os.environ.get("RANK", 0)), world


def cores_per_process():
    """The cores this process may use, of those that it shares with the others on its machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def loading_workers(asked=None):
    """Loading processes: as many as asked for, else as leave a core to the training process, at most 8."""
    return min(8, max(1, cores_per_process() - 1)) if asked is None else asked


def precision(choice, device):
    """The autocast dtype and, in words, why."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        best = torch.bfloat16 if major >= 8 else torch.float16      # is_bf16_supported() says yes on V100, by emulation
        why = f"{torch.cuda.get_device_name(device)}, SM {major}.{minor}"
    else:
        bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        best = torch.bfloat16 if bf16 else torch.float32
        why = f"CPU {'with' if bf16 else 'without'} bf16 arithmetic"
    if choice == "auto":
        return best, why
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[choice], "as asked"


def lr_at(epoch, warmup, epochs, peak):
    """§3.1: linear from peak / 10 to peak over `warmup` epochs, then cosine to peak * 0.10 / 0.64. epoch: fractional."""
    start, end = peak / 10, peak * 0.10 / 0.64
    if epoch < warmup:
        return start + (peak - start) * epoch / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * (epoch - warmup) / max(1, epochs - warmup))) / 2


def everyone(value):
    """[value of each process], in the order of their ranks."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def serialised(state):
    """The bytes that torch.save would write."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def write_whole(content, path):
    """Leave either the old file or the new one: temporary file, fsync, rename. Raises OSError where it cannot."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error.strerror}): make room, then the same command goes on from the last "
                      "checkpoint, which stands") from error


def signature(clips):
    """What a data set is, in few words, for the comparison of `resume`: how many files, and a sum of names and labels."""
    return f"{len(clips)} clips, sum {zlib.crc32(''.join(f'{Path(row.path).name} {row.label} ' for row in clips.rows).encode()):08x}"


def save(writer, path, args, clips, at, kept, model, optimizer, scaler):
    """Serialise everything, then write it to `path` in the thread of `writer`. Returns the future of that.

    clips: of `signature`. at: (epoch, clips of that epoch already used, steps). kept: what each process keeps, by rank.
    Plain values and tensors only, so that weights_only=True reads them.
    """
    state = {"args": vars(args), "clips": clips, "at": at, "processes": kept, "model": model.state_dict(),
             "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    return writer.submit(write_whole, serialised(state), path)


def resume(path, args, clips, model, optimizer, scaler):
    """Load the checkpoint at `path`, if there is one. Returns `at` and `kept` of `save`. ValueError on other settings."""
    if not path.exists():
        return (0, 0, 0), []
    state = read_state(path, ("args", "clips", "at", "processes", "model", "optimizer", "scaler"))
    now, then = vars(args) | {"data set": clips}, state["args"] | {"data set": state["clips"]}
    other = [f"{name} {then.get(name)} there, {now.get(name)} here" for name in now.keys() | then.keys()
             if name not in FREE and now.get(name) != then.get(name)]
    if other:
        raise ValueError(f"{path} was made with other settings ({'; '.join(sorted(other))}): give those or another --out")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:                                   # empty where the run was not in float16 so far
        scaler.load_state_dict(state["scaler"])
    return state["at"], state["processes"]


def write_line(path, record, mode="a"):
    """One line of json at the end of a log. OSError where it cannot."""
    try:
        with open(path, mode) as log:
            log.write(json.dumps(record) + "\n")
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror}): make room, then the same command goes on") from error


def shorten(log, last):
    """Cut from a log what came after step `last`: it will come again."""
    lines = []
    for line in log.read_text().splitlines(keepends=True) if log.exists() else []:
        try:
            if json.loads(line).get("step", 0) <= last:
                lines.append(line)
        except json.JSONDecodeError:                      # cut off in the middle
            pass
    write_whole("".join(lines).encode(), log)


def rows_of(data, split, out, rank, world):
    """The rows of one part of `data`, a manifest or a folder (None: the built-in set), and {path: reason} left out.

    Rank 0 scans a folder once and keeps its manifest in `out`. Raises ValueError, on all processes, where it cannot.
    """
    source = Path(data or out.parent / "demo")
    if source.suffix == ".csv":
        if not source.exists():
            raise ValueError(f"--data {source}: no such manifest")
        return read_manifest(source, split)
    error = [None]
    if rank == 0:
        cores = len(os.sched_getaffinity(0))
        try:
            if data is None:
                demo.build(source, workers=cores)
            scan.scan(source, cores, out=out / "manifest.csv")
        except ValueError as cause:
            error = [str(cause)]
    if world > 1:                                         # a scan may outlast nccl's patience of 10 minutes
        dist.broadcast_object_list(error, group=dist.new_group(backend="gloo", timeout=timedelta(hours=12)))
    if error[0]:
        raise ValueError(f"--data {source}: {error[0]}")
    return read_manifest(out / "manifest.csv", split)


def build(args, device, dtype, world=1):
    """The model, channels-last and with the same weights on all processes, its optimiser and its loss scaler."""
    torch.manual_seed(args.seed)
    model = SvaCLR(args.arch, args.mapping).to(device)
    model.f.to(memory_format=torch.channels_last_3d)
    model.g.to(memory_format=torch.channels_last)
    if device.type == "cuda" and world > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay,
                                fused=dtype != torch.float16)    # fused momentum is unwritten memory if step 1 overflows
    return model, optimizer, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def objective(net, log_mel, frames, waves, args, dtype):
    """§2.3: frames (B, K, T, H, W, 3) uint8 and waves (B, K, L) of this process -> loss, z_a, z_v (B, K, D)."""
    video, audio = normalize_frames(frames), log_mel(waves)                         # (B, K, 3, T, H, W), (B, K, 1, M, F)
    with torch.autocast(frames.device.type, dtype, enabled=dtype != torch.float32):
        y_v, y_a, z_v, z_a = net(video, audio)                                      # (B, K, C) x 2, (B, K, D) x 2
    loss = soft_info_nce(y_a, y_v, z_a, z_v, eta=args.eta, affinity=args.affinity, detach=args.detach_affinity,
                         affinity_temperature=args.affinity_temperature, symmetric=not args.one_way,
                         normalize=not args.raw_affinity)                           # Eq. 3
    return loss, z_a, z_v


def descend(loss, optimizer, scaler):
    """One step of SGD. Returns whether it was skipped, as it is where float16 gradients are infinite."""
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scale = scaler.get_scale()
    scaler.update()
    return scaler.get_scale() < scale


@torch.no_grad()
def top1(z_a, z_v):
    """Contrastive accuracy at speed 1: share of local sounds whose nearest video, of all processes, is their own."""
    hits = (z_a[:, 0] @ all_gather(z_v[:, 0].contiguous()).T).argmax(1)             # (B,)
    first = (dist.get_rank() if dist.is_initialized() else 0) * len(hits)
    return (hits == first + torch.arange(len(hits), device=hits.device)).float().mean()


def train(args, device, rank, world):
    """§3.1: read the data, build or resume the model, train to the last epoch, save. Raises what `run` names."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    say = print if rank == 0 else lambda *_: None
    if args.data is None:
        say("No --data: the built-in set, with settings fit for it: " + ", ".join(f"{k} {v}" for k, v in DEMO.items()))

    # data
    rows, left_out = rows_of(args.data, args.split, out, rank, world)
    clips = AudioVisualClips(rows, args.frames, args.fps, args.size, args.max_speed, args.seed)
    left_out |= clips.left_out
    loader = make_loader(clips, args.batch_size, loading_workers(args.workers), rank, world)
    N = args.batch_size * world
    for path, reason in list(left_out.items())[:10]:
        say(f"left out: {path}: {reason}")
    if len(left_out) > 10:
        say(f"... and {len(left_out) - 10} more: " + ", ".join(f"{n} {r}" for r, n in Counter(left_out.values()).items()))
    if len(loader) == 0:
        raise ValueError(f"{len(clips)} usable clips ({len(left_out)} left out) do not fill one global batch of {N}: "
                         "give a smaller --batch-size or more data")
    if N < 2:
        raise ValueError("a global batch of 1 has no negatives: give --batch-size 2 or more")

    # model
    dtype, why = precision(args.precision, device)
    model, optimizer, scaler = build(args, device, dtype, world)
    log_mel, peak = LogMel().to(device), args.lr * N / PAPER_BATCH
    net = torch.compile(model) if args.compile else model
    net = DistributedDataParallel(net) if world > 1 else net

    # the effective numbers
    K = 1 if args.max_speed == 1 else 2
    say(f"{world} process(es) on {device.type}, {str(dtype)[6:]} ({why}), {torch.get_num_threads()} thread(s), "
        f"{loader.num_workers} loading worker(s) each")
    say(f"{len(clips)} clips ({len(left_out)} left out), global batch {N}, {K} view(s): {K * (N - 1)} negatives per "
        f"query, {len(loader)} steps an epoch, {args.epochs * len(loader)} steps in all")
    say(f"learning rate {peak / 10:.4g} -> {peak:.4g} -> {peak * 0.10 / 0.64:.4g} "
        f"(the paper's for a batch of 512, times {N}/512)")
    about = {"processes": world, "precision": str(dtype)[6:], "torch": torch.__version__, "clips": len(clips),
             "left_out": Counter(left_out.values())}

    # §2.3: end-to-end training with Eq. 3
    def forward(frames, waves):                           # (B, K, T, H, W, 3), (B, K, L)
        loss, z_a, z_v = objective(net, log_mel, frames, waves, args, dtype)
        return loss, lambda: top1(z_a.detach(), z_v.detach())

    def rates(epoch):
        return [lr_at(epoch, args.warmup, args.epochs, peak)]

    fit(out / "checkpoint.pt", args, about, loader, model, optimizer, scaler, rates, forward, rank, world)
    if rank == 0:
        write_whole(serialised(model.f.state_dict()), out / "video_encoder.pt")
        write_whole(serialised(model.g.state_dict()), out / "audio_encoder.pt")
        print(f"done: {out}/checkpoint.pt, video_encoder.pt, audio_encoder.pt")


def fit(path, args, about, loader, model, optimizer, scaler, rates, forward, rank, world):
    """Train to the end of args.epochs: steps, log and checkpoints, from the checkpoint at `path` on if there is one.

    rates(epoch) -> the learning rate of each parameter group; forward(*batch) -> loss, and a function that gives the
    batch's accuracy. about: what the log begins with, beside the arguments. After SIGTERM or SIGUSR1 to any process all
    save and exit with status 75. Raises FloatingPointError where the loss is not finite, ValueError, OSError.
    """
    clips, sampler, log = loader.dataset, loader.batch_sampler, path.with_name("log.jsonl")
    device, N = next(model.parameters()).device, sampler.batch_size * world
    (epoch, start, step), kept = resume(path, args, signature(clips), model, optimizer, scaler)
    if len(set(everyone((epoch, start, step, signature(clips))))) > 1:
        raise ValueError(f"processes see different checkpoints or data: is --out {args.out} on a file system they share?")
    last_step = step + (len(clips) - start) // N + (args.epochs - epoch - 1) * len(loader)
    mine = kept[rank] if len(kept) == world else {"losses": [], "failed": sum(p["failed"] for p in kept) * (rank == 0),
                                                  "skipped": max([p["skipped"] for p in kept], default=0)}
    if "rng" in mine:
        torch.set_rng_state(mine["rng"])
    if step == last_step:
        if rank == 0:
            print(f"{path} is trained to its last step already: nothing to do")
        return
    if rank == 0 and step:
        print(f"continuing {path} at step {step} of {last_step}" + (f": {len(kept)} process(es) there, {world} here, so the "
              f"rest of the epoch is dealt out anew, in batches of {N} in all, and no longer the same to the bit" if len(kept) != world else ""))
        shorten(log, step)
    elif rank == 0:
        write_line(log, {"args": vars(args), **about}, mode="w")

    signals, handlers = [], {}
    for number in (signal.SIGTERM, signal.SIGUSR1):       # sent before a job is pre-empted or its time is over
        handlers[number] = signal.signal(number, lambda number, frame: signals.append(number))
    bar = tqdm(total=last_step, initial=step, desc="training", unit="step", disable=rank > 0, file=sys.stderr)
    writer, writing, saved_step = ThreadPoolExecutor(1), None, step
    window = [(0, 0, [], torch.tensor(loss, device=device)) for loss in mine["losses"]]     # since the last log event
    failed, skipped, waited, steps, saved = mine["failed"], mine["skipped"], 0.0, 0, time.monotonic()
    since, stop = saved, False
    model.train()
    with bar:                                             # closes it on errors too
        for epoch, start, wait, (*batch, failures) in stream(loader, epoch, start, args.epochs, N):
            waited += wait
            for failure in sum(failures, []):
                failed += 1
                tqdm.write(f"replaced: {failure}", file=sys.stderr)
            lrs = rates(epoch + start / N / len(loader))
            for group, lr in zip(optimizer.param_groups, lrs):
                group["lr"] = lr
            late = time.monotonic() - saved >= 60 * args.save_every
            asked = torch.tensor([bool(signals), rank == 0 and late], dtype=torch.uint8)
            told = dist.all_reduce(asked, dist.ReduceOp.MAX, async_op=True) if world > 1 else None

            loss, accuracy = forward(*(x.to(device, non_blocking=True) for x in batch))
            skipped += descend(loss, optimizer, scaler)
            window.append((epoch, start, lrs, loss.detach()))
            step, steps = step + 1, steps + 1
            at = (epoch, start + N, step) if step < last_step else (args.epochs, 0, step)
            if told:
                told.wait()                               # so that all processes stop and save at the same step
            stop, keep = asked.tolist()
            due = step % LOG_EVERY == 0 or step == last_step
            if due or stop or keep:
                mine = {"losses": torch.stack([loss for *_, loss in window]).tolist(), "failed": failed,
                        "skipped": skipped, "rng": torch.get_rng_state()}
                finite = torch.stack([x.isfinite().all() for x in model.parameters()]).all().item()
                kept = everyone(mine)
                check(path, window, kept, clips, sampler, saved_step, step, rank)
                if not finite:
                    raise FloatingPointError(f"weights that are not finite after step {step}, learning rate {lrs[0]:.4g}: "
                                             f"{stands(saved_step)}; try a lower --lr and another --out")
                replaced, now = sum(p["failed"] for p in kept), time.monotonic()
                if replaced > args.max_failures * step * N:
                    raise ValueError(f"{replaced} of {step * N} clips had to be replaced, more than --max-failures "
                                     f"{args.max_failures} of them: see the causes above, check the disk and the manifest")
            if due:
                mean = sum(sum(p["losses"]) for p in kept) / len(window) / world
                hits = sum(everyone(accuracy().item())) / world
                record = {"step": step, "epoch": round(epoch + (start + N) / N / len(loader), 3), "loss": round(mean, 5),
                          "top1": round(hits, 4), "lr": lrs[0], "clips_per_s": round(steps * N / (now - since), 2),
                          "wait": round(waited / (now - since), 3), "replaced": replaced, "skipped": skipped}
                since, waited, steps, window = now, 0.0, 0, []
                if rank == 0:
                    write_line(log, record)
                    bar.set_postfix(loss=f"{mean:.3f}", clips_s=record["clips_per_s"], wait=f"{record['wait']:.0%}")
                for p in kept:
                    p["losses"] = []
            if stop or keep or step == last_step:
                if rank == 0:
                    if writing:
                        writing.result()                  # raises what the writing has met
                    writing = save(writer, path, args, signature(clips), at, kept, model, optimizer, scaler)
                saved, saved_step = time.monotonic(), step
            bar.update()
            if stop:
                break
    if rank == 0:
        writing.result()
    everyone(None)                                        # the others wait for the writing
    for x in model.buffers() if world > 1 else []:        # BatchNorm's statistics, on CPUs each process's own: those saved
        dist.broadcast(x, 0)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stop:
        if rank == 0:
            print(f"stopped by a signal, saved at step {step} of {last_step}: the same command goes on from there", flush=True)
        if world > 1:
            dist.destroy_process_group()
        sys.exit(REQUEUE)


def stream(loader, epoch, start, epochs, N):
    """(epoch, clips of it used before, seconds waited, batch), from there to the end of the last epoch."""
    while epoch < epochs:
        loader.batch_sampler.epoch, loader.batch_sampler.start = epoch, start
        batches = iter(loader)
        for before in range(start, len(loader.dataset) - N + 1, N):
            began = time.monotonic()
            batch = next(batches)
            yield epoch, before, time.monotonic() - began, batch
        epoch, start = epoch + 1, 0


def stands(step):
    """In words, what is left where a run breaks off: the checkpoint of `step`, or none (0)."""
    return f"the checkpoint of step {step} stands" if step else "there is no checkpoint yet"


def check(path, window, kept, clips, sampler, saved_step, step, rank):
    """Raise FloatingPointError, on all processes, where a loss since the last log event is not finite on any."""
    for n, losses in enumerate(zip(*(p["losses"] for p in kept))):
        if all(map(math.isfinite, losses)):
            continue
        sampler.epoch, sampler.start, lrs, _ = window[n]
        files = sum(everyone([clips.rows[index].path for _, index in next(iter(sampler))]), [])
        step = step - len(window) + n + 1
        if rank == 0:
            write_line(path.with_name("log.jsonl"), {"step": step, "losses": losses, "files": files})
        more = f" and {len(files) - 8} more, all named in log.jsonl" if len(files) > 8 else ""
        loss = next(x for x in losses if not math.isfinite(x))
        raise FloatingPointError(f"loss {loss} at step {step}, learning rate {lrs[0]:.4g}, batch {', '.join(files[:8])}{more}: "
                                 f"{stands(saved_step)}; look at these files, or try a lower --lr and another --out")


def run(job, *args):
    """job(*args, device, rank, world) with one sentence on stderr and exit status 1 where it raises what it names."""
    device, rank, world = setup()
    try:
        job(*args, device, rank, world)
    except (ValueError, FloatingPointError, OSError, TooManyFailures) as error:
        where = f" on rank {rank}" if rank else ""        # a loading process adds its traceback above the sentence
        print(f"error{where}: {str(error).strip().splitlines()[-1]}", file=sys.stderr, flush=True)
        if world > 1:
            sys.stdout.flush()
            os._exit(1)                                   # taking the group down would wait for the others
        sys.exit(1)
    if world > 1:
        dist.destroy_process_group()


def main():
    """The command."""
    run(train, parse())


if __name__ == "__main__":
    main()
