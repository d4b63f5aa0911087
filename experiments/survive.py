"""What a run survives, shown with real processes and real signals on CPUs, on the built-in set (or --data).

    python -m experiments.survive kills               # kill -9 at 20 random moments: the same weights, the same log
    python -m experiments.survive worker              # one of two processes killed under torchrun --max-restarts
    python -m experiments.survive saving              # how long a checkpoint of the full model holds training up
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from experiments.bench import record
from prepare import demo
from pretrain import build, parse, save

ROOT = Path(__file__).parent.parent
# A short run that saves every second, in float32, so that it repeats to the bit.
SHORT = ["--arch", "r2plus1d_10", "--size", "16", "--frames", "4", "--fps", "4", "--warmup", "1", "--workers", "1",
         "--precision", "fp32", "--save-every", "0.02"]


def start(out, flags, launch=()):
    """pretrain.py with the settings of SHORT, as a process of its own; launch: torchrun's flags, if it is to launch it."""
    torchrun = ["-m", "torch.distributed.run", *launch] if launch else []
    log = open(out.with_suffix(".txt"), "a")
    return subprocess.Popen([sys.executable, *torchrun, str(ROOT / "pretrain.py"), "--out", str(out), *SHORT,
                             *map(str, flags)], cwd=ROOT, stdout=log, stderr=log,
                            env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "CUDA_VISIBLE_DEVICES": ""})


def steps(out):
    """The step numbers in OUT/log.jsonl."""
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line).get("step", 0) for line in lines if line.endswith("}")][1:]


def events(out):
    """The lines of OUT/log.jsonl after the first, without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()[1:]]
    return [{name: value for name, value in line.items() if name not in ("clips_per_s", "wait")} for line in lines]


def written(out):
    """When OUT/checkpoint.pt was written."""
    return (out / "checkpoint.pt").stat().st_mtime_ns if (out / "checkpoint.pt").exists() else None


def state(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same(one, other):
    """Whether two nested states are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one.equal(other) if isinstance(one, torch.Tensor) else one == other


def kills(folder, flags, number, seed=0):
    """Kill a run `number` times at random moments and start it again each time. Returns (whether its weights, momentum
    and log are those of a run that nothing happened to, how many runs were killed alive, how many of them in training)."""
    whole, cut, rng = folder / "whole", folder / "cut", np.random.default_rng(seed)
    run, began = start(whole, flags), time.monotonic()
    while not (whole / "checkpoint.pt").exists():
        time.sleep(0.1)
        assert run.poll() is None, (folder / "whole.txt").read_text()
    ready = time.monotonic() - began                      # s from the start to the first checkpoint
    assert run.wait() == 0, (folder / "whole.txt").read_text()
    training, alive, within = time.monotonic() - began - ready, 0, 0
    for _ in range(number):
        run, before = start(cut, flags), written(cut)
        time.sleep(rng.uniform(0.5 * ready, ready + training / number))      # so that work is left for the last
        alive, within = alive + (run.poll() is None), within + (run.poll() is None and written(cut) != before)
        run.kill()
        run.wait()
    assert start(cut, flags).wait() == 0, (folder / "cut.txt").read_text()
    one, other = state(whole), state(cut)
    equal = all(same(one[name], other[name]) for name in ("model", "optimizer", "scaler", "at"))
    return equal and events(whole) == events(cut), alive, within


def worker(folder, flags):
    """Kill one of two processes once a step is logged. Returns s until a later step than any before is logged."""
    out = folder / "two"
    run = start(out, flags, ["--standalone", "--nproc_per_node=2", "--max-restarts=2"])
    while not steps(out):
        time.sleep(0.1)
        assert run.poll() is None, (folder / "two.txt").read_text()
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    killed, last = time.monotonic(), max(steps(out))
    while max(steps(out), default=0) <= last:
        time.sleep(0.1)
        assert run.poll() is None, (folder / "two.txt").read_text()
    seconds = time.monotonic() - killed
    assert run.wait() == 0, (folder / "two.txt").read_text()
    return seconds


def saving(folder, rounds=7):
    """Seconds for which a checkpoint of R(2+1)D-18 and ResNet-9 holds training up, and until it is on the disk."""
    args = parse(["--data", "unread"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, optimizer, scaler = build(args, device, torch.float32)
    for x in model.parameters():
        x.grad = torch.zeros_like(x)
    optimizer.step()                                      # so that there is momentum
    held, whole = [], []
    with ThreadPoolExecutor(1) as writer:
        for _ in range(rounds):
            began = time.monotonic()
            writing = save(writer, folder / "checkpoint.pt", args, 0, (0, 0, 0), [], model, optimizer, scaler)
            held.append(time.monotonic() - began)
            writing.result()
            whole.append(time.monotonic() - began)
    return held, whole, (folder / "checkpoint.pt").stat().st_size


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("what", choices=["kills", "worker", "saving"])
    p.add_argument("--data", default="runs/demo", help="folder of videos (default runs/demo: the built-in set)")
    p.add_argument("--number", type=int, default=20, help="kills: how many (default 20)")
    p.add_argument("--epochs", type=int, default=4, help="length of the run (default 4)")
    p.add_argument("--batch-size", type=int, default=32, help="clips per process (default 32)")
    p.add_argument("--csv", help="file to add the results to (default: none)")
    args = p.parse_args()
    if args.data == p.get_default("data"):
        demo.build(Path(args.data))
    flags = ["--data", args.data, "--epochs", args.epochs, "--batch-size", args.batch_size]
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "kills":
            equal, alive, within = kills(Path(folder), flags, args.number)
            print(f"{alive} kills, {within} of them after a new checkpoint: weights, momentum and log "
                  f"{'are those' if equal else 'DIFFER from those'} of the uninterrupted run")
            record(args, "kills", {"alive": alive, "after a new checkpoint": within, "same weights, momentum and log": equal})
            sys.exit(not equal)
        if args.what == "worker":
            seconds = worker(Path(folder), flags)
            print(f"a killed worker of two: training went on after {seconds:.1f} s")
            record(args, "killed worker of two", {"s": seconds})
        if args.what == "saving":
            held, whole, size = saving(Path(folder))
            print(f"a checkpoint of {size / 1e6:.0f} MB: training held up {statistics.median(held):.2f} s (at most "
                  f"{max(held):.2f}), on the disk after {statistics.median(whole):.2f} s (at most {max(whole):.2f})")
            record(args, "checkpoint of the full model", {"MB": size / 1e6, "s held up": statistics.median(held),
                                                          "s until on disk": statistics.median(whole)})
