"""SvaCLR pre-training (§2.3, §3.1 of arXiv 2309.13942): speed co-augmentation and SoftInfoNCE.

    python pretrain.py                                                      # CPU or GPU, the built-in set, minutes
    python pretrain.py --data kinetics --out runs/k400                      # one GPU
    torchrun --nproc_per_node=8 pretrain.py --data kinetics --out runs/k400 # 8 GPUs (or as many CPU processes)

Defaults are the paper's; help texts name the section, or GDT where the paper is silent and its code base decides.
The same command again continues an interrupted run. OUT gets checkpoint.pt (everything), video_encoder.pt and
audio_encoder.pt (torchvision's names), log.jsonl (the arguments, then one line per log event), manifest.csv.
"""

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from augment import LogMel, normalize_frames
from data import AudioVisualClips, TooManyFailures, make_loader, read_manifest
from loss import all_gather, soft_info_nce
from models import SvaCLR
from prepare import demo, manifest

PAPER_BATCH = 512                                         # §3.1: 64 GPUs x 8, the batch its learning rates belong to
LOG_EVERY = 10                                            # steps
# For the built-in set: small frames and a small encoder, so that two CPU cores train it in minutes.
DEMO = dict(arch="r2plus1d_10", size=32, frames=4, fps=4, batch_size=32, epochs=15, warmup=1)


def parse(argv=None):
    """The arguments, argv's or the command line's. Exits with status 2 and a sentence where they do not fit."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    data = p.add_argument_group("data")
    data.add_argument("--data", help="folder ROOT/[train|val|test/]class/*.mp4, or manifest.csv (default: the built-in set)")
    data.add_argument("--split", default="train", help="the part to train on, where the data has parts (default train)")
    data.add_argument("--out", default="runs/svaclr", help="folder of the results (default runs/svaclr)")
    data.add_argument("--workers", type=int, default=None, help="loading processes per process (default: the cores "
                      "per process but one, at most 8)")
    data.add_argument("--max-failures", type=float, default=0.05, help="share of clips replaced because their file fails "
                      "that stops the run (0.05; this project's)")
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
    run = p.add_argument_group("running")
    run.add_argument("--seed", type=int, default=0, help="of weights, order and draws (0)")
    run.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
                     help="(default auto: bf16 where the hardware has it, fp16 on older GPUs, else fp32)")
    run.add_argument("--compile", action="store_true", help="torch.compile the model (default off)")
    run.add_argument("--save-every", type=float, default=10, help="minutes between checkpoints (10)")
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


def setup():
    """device, rank, world: torchrun's environment decides; without it, one process and no group."""
    local, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    else:                                                 # share the cores out among this machine's processes
        torch.set_num_threads(cores_per_process())
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return device, int(os.environ.get("RANK", 0)), world


def cores_per_process():
    """The cores this process may use, of those that it shares with the others on its machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def loading_workers():
    """Loading processes that leave a core to the training process, at most 8."""
    return min(8, max(1, cores_per_process() - 1))


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
    if choice == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU: choose bf16 or fp32 on a CPU")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[choice], "as asked"


def lr_at(step, steps_per_epoch, warmup, epochs, peak):
    """§3.1: linear from peak / 10 to peak over `warmup` epochs, then cosine to peak * 0.10 / 0.64, per step."""
    step, start, end = step / steps_per_epoch, peak / 10, peak * 0.10 / 0.64
    if step < warmup:
        return start + (peak - start) * step / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup) / max(1, epochs - warmup))) / 2


def write_whole(state, path):
    """torch.save that leaves either the old file or the new one: temporary file, fsync, rename."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def save(out, args, step, model, optimizer, scaler, world, clips):
    """checkpoint.pt and the two encoders. Plain values and tensors only, so that weights_only=True reads them."""
    write_whole({"args": vars(args), "processes": world, "clips": clips, "step": step, "model": model.state_dict(),
                 "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "rng": torch.get_rng_state()},
                out / "checkpoint.pt")
    write_whole(model.f.state_dict(), out / "video_encoder.pt")
    write_whole(model.g.state_dict(), out / "audio_encoder.pt")


def resume(out, args, model, optimizer, scaler, world, clips):
    """Load OUT/checkpoint.pt if there is one. Returns the step to go on from. Raises ValueError on other settings."""
    path = out / "checkpoint.pt"
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    now = {**vars(args), "processes": world, "clips": clips}
    then = {**state["args"], "processes": state["processes"], "clips": state["clips"]}
    free = {"out", "workers", "save_every", "compile", "max_failures"}    # may differ: they change no result
    other = [f"{name} {then.get(name)} there, {now.get(name)} here" for name in now.keys() | then.keys()
             if name not in free and now.get(name) != then.get(name)]
    if other:
        raise ValueError(f"{path} was made with other settings ({'; '.join(sorted(other))}): give those again, or another --out")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"])
    return state["step"]


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
            manifest.scan(source, cores, out=out / "manifest.csv")
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


def update(net, log_mel, frames, waves, args, optimizer, scaler, dtype):
    """§2.3, one step: frames (B, K, T, H, W, 3) uint8 and waves (B, K, L) of this process -> loss, z_a, z_v, detached."""
    video, audio = normalize_frames(frames), log_mel(waves)                         # (B, K, 3, T, H, W), (B, K, 1, M, F)
    with torch.autocast(frames.device.type, dtype, enabled=dtype != torch.float32):
        y_v, y_a, z_v, z_a = net(video, audio)                                      # (B, K, C) x 2, (B, K, D) x 2
    loss = soft_info_nce(y_a, y_v, z_a, z_v, eta=args.eta, affinity=args.affinity, detach=args.detach_affinity,
                         affinity_temperature=args.affinity_temperature, symmetric=not args.one_way,
                         normalize=not args.raw_affinity)                           # Eq. 3
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach(), z_a.detach(), z_v.detach()


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
    workers = args.workers if args.workers is not None else loading_workers()
    loader = make_loader(clips, args.batch_size, workers, rank, world)
    steps_per_epoch = len(loader)
    N = args.batch_size * world
    for path, reason in list(left_out.items())[:10]:
        say(f"left out: {path}: {reason}")
    if len(left_out) > 10:
        say(f"... and {len(left_out) - 10} more: " + ", ".join(f"{n} {r}" for r, n in Counter(left_out.values()).items()))
    if steps_per_epoch == 0:
        raise ValueError(f"{len(clips)} usable clips ({len(left_out)} left out) do not fill one global batch of {N}: "
                         "give a smaller --batch-size or more data")
    if N < 2:
        raise ValueError("a global batch of 1 has no negatives: give --batch-size 2 or more")

    # model
    dtype, why = precision(args.precision, device)
    model, optimizer, scaler = build(args, device, dtype, world)
    log_mel, peak = LogMel().to(device), args.lr * N / PAPER_BATCH
    step, last_step = resume(out, args, model, optimizer, scaler, world, len(clips)), args.epochs * steps_per_epoch
    if world > 1:
        seen = torch.tensor([step, len(clips), -step, -len(clips)], device=device)
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        if (seen[:2] + seen[2:]).any():
            raise ValueError(f"processes see different checkpoints or data: is --out {out} on a file system that all share?")
    net = torch.compile(model) if args.compile else model
    net = DistributedDataParallel(net) if world > 1 else net

    # the effective numbers
    K = 1 if args.max_speed == 1 else 2
    say(f"{world} process(es) on {device.type}, {str(dtype)[6:]} ({why}), {torch.get_num_threads()} thread(s), "
        f"{workers} loading worker(s) each")
    say(f"{len(clips)} clips ({len(left_out)} left out), global batch {N}, {K} view(s): {K * (N - 1)} negatives per "
        f"query, {steps_per_epoch} steps an epoch, {last_step} steps in all")
    say(f"learning rate {peak / 10:.4g} -> {peak:.4g} -> {peak * 0.10 / 0.64:.4g} "
        f"(the paper's for a batch of 512, times {N}/512)")
    if step:
        say(f"continuing {out / 'checkpoint.pt'} at step {step} of {last_step}")
    log = open(out / "log.jsonl", "a", buffering=1) if rank == 0 else None
    if log and step == 0:
        log.write(json.dumps({"args": vars(args), "processes": world, "precision": str(dtype)[6:],
                              "torch": torch.__version__, "clips": len(clips), "left_out": Counter(left_out.values())}) + "\n")

    # §2.3: end-to-end training with Eq. 3
    bar = tqdm(total=last_step, initial=step, desc="pre-training", unit="step", disable=rank > 0, file=sys.stderr)
    model.train()
    saved = since = time.monotonic()
    waited, losses, failed, start = 0.0, [], 0, step
    while step < last_step:
        loader.batch_sampler.epoch, loader.batch_sampler.start = divmod(step, steps_per_epoch)
        batches = iter(loader)
        for _ in range(steps_per_epoch - loader.batch_sampler.start):
            began = time.monotonic()
            frames, waves, failures = next(batches)                                 # (B, K, T, H, W, 3), (B, K, L)
            waited += time.monotonic() - began
            for failure in sum(failures, []):
                failed += 1
                tqdm.write(f"replaced: {failure}", file=sys.stderr)
            lr = lr_at(step, steps_per_epoch, args.warmup, args.epochs, peak)
            for group in optimizer.param_groups:
                group["lr"] = lr

            loss, z_a, z_v = update(net, log_mel, frames.to(device, non_blocking=True),
                                    waves.to(device, non_blocking=True), args, optimizer, scaler, dtype)
            step += 1
            losses.append(loss)
            if step % LOG_EVERY == 0 or step == last_step:
                values = torch.stack([torch.stack(losses).mean(), top1(z_a, z_v), torch.tensor(float(failed), device=device)])
                if world > 1:
                    dist.all_reduce(values)
                mean, accuracy, replaced = values[0].item() / world, values[1].item() / world, int(values[2].item())
                if not math.isfinite(mean):
                    raise FloatingPointError(f"loss {mean} at step {step}, learning rate {lr:.4g}: the last good "
                                             f"checkpoint stands; try a lower --lr")
                if replaced > args.max_failures * (step - start) * N:
                    raise ValueError(f"{replaced} of {(step - start) * N} clips had to be replaced, more than --max-failures "
                                     f"{args.max_failures} of them: see the causes above, check the disk and the manifest")
                now = time.monotonic()
                record = {"step": step, "epoch": round(step / steps_per_epoch, 3), "loss": round(mean, 5),
                          "top1": round(accuracy, 4), "lr": lr, "clips_per_s": round(len(losses) * N / (now - since), 2),
                          "wait": round(waited / (now - since), 3), "replaced": replaced}
                since, waited, losses = now, 0.0, []
                if rank == 0:
                    log.write(json.dumps(record) + "\n")
                    bar.set_postfix(loss=f"{mean:.3f}", clips_s=record["clips_per_s"], wait=f"{record['wait']:.0%}")
                    if step == last_step or now - saved > 60 * args.save_every:
                        save(out, args, step, model, optimizer, scaler, world, len(clips))
                        saved = time.monotonic()
            bar.update()
    bar.close()
    say(f"done: {out}/checkpoint.pt, video_encoder.pt, audio_encoder.pt" if start < last_step else
        f"{out}/checkpoint.pt is trained to its last step already: nothing to do")


def run(job, *args):
    """job(*args, device, rank, world) with one sentence on stderr and exit status 1 where it raises what it names."""
    device, rank, world = setup()
    try:
        job(*args, device, rank, world)
    except (ValueError, FloatingPointError, TooManyFailures) as error:
        where = f" on rank {rank}" if rank else ""        # a loading process adds its traceback above the sentence
        print(f"error{where}: {str(error).strip().splitlines()[-1]}", file=sys.stderr, flush=True)
        if world > 1:
            os._exit(1)                                   # taking the group down would wait for the others
        sys.exit(1)
    if world > 1:
        dist.destroy_process_group()


def main():
    """The command."""
    run(train, parse())


if __name__ == "__main__":
    main()
