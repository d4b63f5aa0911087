"""The run of a training script: steps, log, checkpoints, resume, signals.

The script owns the training loop, and a Run is what the loop iterates over:

    run = Run(args, loader, model, optimizer, scaler, metadata)
    for epoch, batch in run:
        ...                                     # one step of the optimiser
        run.log(loss=loss, top1=top1, lr=lr)

Between two steps the Run counts, logs, checks that losses and weights are finite, saves, and stops
after a signal. The folder args.out gets checkpoint.pt and log.jsonl. `lock_folder` has locked it.
"""

import errno
import fcntl
import json
import math
import os
import signal
import socket
import sys
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from support.checkpoints import read_state, serialise, write_atomic
from support.processes import (INTERRUPTED, SIGNALS, at_least, gather, rank, run_once, say, share,
                               signals_blocked, world_size)

LOG_EVERY = 10                                  # steps
REQUEUE = 75                                    # exit status after a scheduler's signal
# A resumed run may change these settings. (The classes belong to the data, which are compared.)
CHANGEABLE = {"out", "workers", "save_every", "keep_every", "compile", "max_failures", "test_clips",
              "classes"}
MARK = "requeue"                                # left in OUT by a run that a signal has ended
# What a checkpoint holds, see Run.save and Run.resume.
STATE = ("settings", "fingerprint", "position", "step", "world_size", "replaced", "skipped",
         "log_bytes", "model", "optimizer", "scaler")


def add_run_flags(parser):
    """Add the flags of a script that trains. Returns their group."""
    run = parser.add_argument_group("running")
    run.add_argument("--seed", type=at_least(0), default=0,
                     help="of weights, order and draws (0; our choice)")
    run.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
                     help="of the encoders (auto; our choice: bf16 where the hardware has it, fp16 "
                     "on older GPUs, else fp32)")
    run.add_argument("--workers", type=at_least(0), help="loading processes of each process "
                     "(default: the cores per process but one, at most 8; our choice)")
    run.add_argument("--max-failures", type=share, default=0.05,
                     help="share of clips that may fail to be read; training replaces them, a test "
                     "leaves them out, and clearly more stop the run (0.05; our choice)")
    run.add_argument("--save-every", type=at_least(0, float), default=10,
                     help="minutes between checkpoints (10; our choice)")
    run.add_argument("--keep-every", type=at_least(1), metavar="E",
                     help="keep the checkpoint of every E-th epoch, as checkpoint-<epoch>.pt "
                     "(none; our choice)")
    return run


locks = {}                                      # path of a lock: its open file


def lock_folder(out, args=None):
    """Make the folder of a run, keep other runs out of it, and remove the mark of the last run.

    args: the settings of this run. They are compared with those of the folder's checkpoint here,
    before a scan of other data writes over the manifest of that run.

    Process 0 locks OUT/lock, which names its host and its number. The lock goes with the process,
    so what a killed run has left does no harm. Raises ValueError on all processes if another run
    has the lock, if the folder cannot be written, or if the settings are others.
    """
    def lock():
        path = Path(out).resolve() / "lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = locks.get(path) or open(path, "a+")
        except OSError as error:
            raise ValueError(f"--out {out} cannot be written ({error.strerror}): mend that, or "
                             "give another --out") from None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise ValueError(f"--out {out} is in use by {owner}: wait until it has ended, or "
                                 f"give another --out (if that machine is gone, delete {path})"
                                 ) from None
            say(f"warning: {path} cannot be locked ({error.strerror}): see to it yourself that no "
                "other run has the same --out", sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        locks[path] = file                      # open for as long as the process lives
        path.with_name(MARK).unlink(missing_ok=True)
        checkpoint = path.with_name("checkpoint.pt")
        if args and checkpoint.exists():
            refuse_others(Path(out, "checkpoint.pt"), read_state(checkpoint, STATE), vars(args))

    run_once(lock)


def refuse_others(path, state, now):
    """Raise ValueError if the settings `now` are others than those of the checkpoint at `path`."""
    then = state["settings"] | {"data set": state["fingerprint"]}
    different = sorted(f"{name} was {then.get(name)} and is {value}" for name, value in now.items()
                       if name not in CHANGEABLE and value != then.get(name))
    if different:
        raise ValueError(f"{path} was made with other settings ({'; '.join(different)}): "
                         "give the former ones or another --out")


class Run:
    """Training from the first step, or from the last checkpoint, to the last step.

    Args:
        args: the settings, a Namespace. Read are out, epochs, save_every, keep_every and
            max_failures.
        loader: a DataLoader of data.make_loader with epochs.
        model, optimizer, scaler: saved in the checkpoint and continued from it.
        metadata: a dict for the first line of the log, beside the settings.
    Iterating yields (epoch, batch): the fractional epoch, and the tensors of the batch on the
    model's device. After SIGTERM or SIGUSR1 to any process all processes save, leave the mark
    OUT/requeue, and exit with status 75. After Ctrl-C (SIGINT) they save and exit with status 130,
    and another signal after that ends them at once. Raises ValueError if the checkpoint belongs to
    other settings or data, or if too many clips fail; FloatingPointError if the loss or a weight is
    not finite; OSError if a file cannot be written.
    """

    def __init__(self, args, loader, model, optimizer, scaler, metadata):
        self.args, self.loader, self.metadata = args, loader, metadata
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.path = Path(args.out) / "checkpoint.pt"
        self.log_path = self.path.with_name("log.jsonl")
        self.sampler = loader.batch_sampler
        self.N = self.sampler.batch_size * world_size()         # clips in the global batch
        self.fingerprint = fingerprint(loader.dataset.rows)
        self.epoch = self.used = self.step = 0                  # used: clips of this epoch
        self.saved_step = self.replaced = self.skipped = 0
        self.drawn = self.failed = 0            # clips since this start, for --max-failures
        resumed_from = self.resume() if self.path.exists() else None
        if len(set(gather((self.epoch, self.used, self.step, self.fingerprint)))) > 1:
            raise ValueError("the processes see different checkpoints or data: "
                             f"is --out {args.out} on a file system that they share?")
        self.sampler.epoch, self.sampler.used = self.epoch, self.used
        self.last_step = self.step + len(loader)
        if self.step == self.last_step:
            say(f"{self.path} has been trained to its last step (another --out starts a new run)")
        elif self.step:
            say(f"continuing {self.path} at step {self.step} of {self.last_step}" + (
                f"; it ran on {resumed_from} process(es) and now runs on {world_size()}, in global "
                f"batches of {self.N}, so the weights will not be the same to the bit"
                if resumed_from != world_size() else ""))

    def __iter__(self):
        if self.step == self.last_step:
            return
        if rank() == 0 and self.step == 0:
            self.write_line({"args": vars(self.args), **self.metadata}, "w")
        elif rank() == 0 and self.log_path.exists():    # what follows the checkpoint comes again
            os.truncate(self.log_path, min(self.log_bytes, self.log_path.stat().st_size))
        device = next(self.model.parameters()).device
        self.model.train()
        self.start_window()
        self.saved_at = time.monotonic()
        self.bar = tqdm(total=self.last_step, initial=self.step, desc="training", unit="step",
                        disable=rank() > 0)
        with catch_signals() as statuses, self.bar:
            with signals_blocked():
                batches = iter(self.loader)     # starts the loading processes
            while self.step < self.last_step:
                batch = [x.to(device, non_blocking=True) for x in self.next_batch(batches)]
                # While a step is computed, the processes agree with which status to stop, if any.
                # On one process a scheduler's signal (75) counts before Ctrl-C (130).
                should_stop = torch.tensor(min(statuses, default=0), dtype=torch.uint8)
                agreed = dist.all_reduce(should_stop, dist.ReduceOp.MAX, async_op=True)
                scale = self.scaler.get_scale()
                yield self.epoch + self.used / self.N / self.sampler.steps_per_epoch, batch
                self.skipped += self.scaler.get_scale() < scale     # infinite gradients
                self.used, self.step = self.used + self.N, self.step + 1
                agreed.wait()
                self.between_steps(int(should_stop))

    def log(self, **measures):
        """Note the measures of a step: loss, and others, which are scalar tensors or numbers.

        A line of the log has the mean of the tensors over the steps since the last line and over
        the processes, and the last of the numbers.
        """
        self.window[-1] |= {name: x.detach() if torch.is_tensor(x) else x
                            for name, x in measures.items()}

    def next_batch(self, batches):
        """Take a batch, and name the files in it that had to be replaced. Returns its tensors."""
        began = time.monotonic()
        *batch, sources = next(batches)
        self.waited += time.monotonic() - began
        if self.used + self.N > len(self.loader.dataset):
            self.epoch, self.used = self.epoch + 1, 0
        for path, failures in sources:
            self.newly_replaced += len(failures)
            for failure in failures:
                tqdm.write(f"replaced: {failure}", file=sys.stderr)
        self.files.append([path for path, _ in sources])
        self.window.append({})
        return batch

    def between_steps(self, should_stop):
        """Check and log every LOG_EVERY steps, save when it is time, and exit after a signal.

        should_stop: the exit status, or 0 to go on.
        """
        last, every = self.step == self.last_step, self.args.keep_every
        ends_epoch = self.used + self.N > len(self.loader.dataset)
        keep = ends_epoch and every and (self.epoch + 1) % every == 0
        due = self.step % LOG_EVERY == 0 or last or keep
        time_to_save = too_many_failed = False
        if due or should_stop:
            reports = gather(self.measures())
            time_to_save = reports[0]["minutes"] >= self.args.save_every
            self.check(reports)
            failed = sum(report["replaced"] for report in reports)
            self.replaced, self.failed = self.replaced + failed, self.failed + failed
            self.drawn += len(self.window) * self.N + failed
            too_many_failed = clearly_more(self.failed, self.drawn, self.args.max_failures)
            if due:
                self.report(reports)
            self.start_window()
        if time_to_save or should_stop or last or keep or too_many_failed:
            self.save(keep, requeue=should_stop == REQUEUE)
        self.bar.update()
        if should_stop:
            cause = "Ctrl-C" if should_stop == INTERRUPTED else "a signal"
            self.bar.close()
            say(f"stopped by {cause}, saved at step {self.step} of {self.last_step}: the same "
                "command continues from that step")
            sys.exit(should_stop)
        if too_many_failed:
            raise ValueError(f"{self.failed} of the {self.drawn} clips drawn since the start could "
                             f"not be read, clearly more than --max-failures "
                             f"{self.args.max_failures} of them: see the causes above, check the "
                             f"disk and the manifest; {self.surviving()}")

    def measures(self):
        """What this process tells the others: losses, the other measures, and the state of things.

        The measures are since the last line: the mean of tensors, the last of numbers.
        """
        measures = {name: torch.stack([entry[name] for entry in self.window]).mean().item()
                    if torch.is_tensor(value) else value
                    for name, value in self.window[-1].items() if name != "loss"}
        finite = torch.stack([x.isfinite().all() for x in self.model.parameters()]).all().item()
        return {"losses": torch.stack([entry["loss"] for entry in self.window]).tolist(),
                "measures": measures, "finite": finite, "replaced": self.newly_replaced,
                "minutes": (time.monotonic() - self.saved_at) / 60}

    def check(self, reports):
        """Stop all processes if a loss or a weight is not finite."""
        advice = f"{self.surviving()}; try a lower --lr and another --out"
        for n, losses in enumerate(zip(*(report["losses"] for report in reports))):
            if all(map(math.isfinite, losses)):
                continue
            step = self.step - len(self.window) + n + 1
            files = sum(gather(self.files[n]), [])
            if rank() == 0:
                self.write_line({"step": step, "losses": losses, "files": files})
            more = f" and {len(files) - 8} more, which log.jsonl names" if len(files) > 8 else ""
            loss = next(x for x in losses if not math.isfinite(x))
            raise FloatingPointError(f"loss {loss} at step {step}, learning rate "
                                     f"{self.window[n]['lr']:.4g}, batch {', '.join(files[:8])}"
                                     f"{more}: {advice}, or look at these files")
        if not all(report["finite"] for report in reports):
            raise FloatingPointError(f"weights that are not finite after step {self.step}, "
                                     f"learning rate {self.window[-1]['lr']:.4g}: {advice}")

    def report(self, reports):
        """Write a line of the log."""
        now, steps = time.monotonic(), len(self.window)
        seconds = now - self.since
        loss = sum(sum(report["losses"]) for report in reports) / steps / world_size()
        measures = {name: sum(report["measures"][name] for report in reports) / world_size()
                    for name in reports[0]["measures"]}
        record = {"step": self.step,
                  "epoch": round(self.epoch + self.used / self.N / self.sampler.steps_per_epoch, 3),
                  "loss": round(loss, 5), **measures,
                  "clips_per_s": round(steps * self.N / seconds, 2),
                  "wait": round(self.waited / seconds, 3),
                  "replaced": self.replaced, "skipped": self.skipped}
        if rank() == 0:
            self.write_line(record)
            self.bar.set_postfix(loss=f"{loss:.3f}", clips_s=record["clips_per_s"],
                                 wait=f"{record['wait']:.0%}")

    def start_window(self):
        """Forget the steps that have been logged."""
        self.window, self.files = [], []        # of each step: its measures, its files
        self.waited, self.newly_replaced, self.since = 0.0, 0, time.monotonic()

    def save(self, keep=False, requeue=False):
        """Write the checkpoint. The other processes wait until it is on the disk.

        keep: keep it under the number of its epoch too. requeue: leave the mark for a scheduler.
        """
        last = self.step == self.last_step
        if rank() == 0:
            log_bytes = self.log_path.stat().st_size if self.log_path.exists() else 0
            position = (self.args.epochs, 0) if last else (self.epoch, self.used)
            state = dict(settings=vars(self.args), fingerprint=self.fingerprint, position=position,
                         step=self.step, world_size=world_size(), replaced=self.replaced,
                         skipped=self.skipped, log_bytes=log_bytes, model=self.model.state_dict(),
                         optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())
            self.write(state, self.path.name)
            self.saved_step = self.step
            if keep:
                self.write(state, f"checkpoint-{self.epoch + 1}.pt")
            if requeue:
                self.path.with_name(MARK).touch()
        gather(None)
        self.saved_at, self.saved_step = time.monotonic(), self.step

    def write(self, state, name):
        """Write a state to the folder of the run, for torch.load. Only process 0 does."""
        if rank() == 0:
            try:
                write_atomic(serialise(state), self.path.with_name(name))
            except OSError as error:
                raise OSError(f"{error}; {self.surviving()}") from error

    def resume(self):
        """Load the checkpoint. Returns the number of processes that wrote it.

        Raises ValueError if it cannot be loaded, or belongs to other settings or other data.
        """
        state = read_state(self.path, STATE)
        refuse_others(self.path, state, dict.fromkeys(state["settings"]) | vars(self.args)
                      | {"data set": self.fingerprint})
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:                     # empty if the run has not been in float16
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.used = state["position"]
        self.step = self.saved_step = state["step"]
        self.replaced, self.skipped = state["replaced"], state["skipped"]
        self.log_bytes = state["log_bytes"]
        return state["world_size"]

    def surviving(self):
        """Tell the user which checkpoint survives."""
        return (f"the checkpoint of step {self.saved_step} is kept" if self.saved_step
                else "there is no checkpoint yet")

    def write_line(self, record, mode="a"):
        """Write one line of JSON to the log. Raises OSError if it cannot be written."""
        try:
            with open(self.log_path, mode) as log:
                log.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(f"cannot write {self.log_path} ({error.strerror}): make room, then the "
                          f"same command continues; {self.surviving()}") from error


@contextmanager
def catch_signals():
    """Yield a list that receives the exit statuses that SIGNALS ask for. After Ctrl-C the next
    signal ends the process at once."""
    statuses = []

    def receive(number, frame):
        if INTERRUPTED in statuses:
            os.write(2, b"ended by a signal after Ctrl-C: the same command continues from the last "
                        b"checkpoint\n")
            os._exit(INTERRUPTED)
        statuses.append(INTERRUPTED if number == signal.SIGINT else REQUEUE)

    handlers = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield statuses
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def clearly_more(failed, drawn, limit):
    """Whether more than the share `limit` of all clips fail, to judge by those drawn so far.

    If a clip fails with probability `limit`, then P(`failed` or more of `drawn`) is at most
    exp(-drawn KL(failed / drawn || limit)), the Chernoff bound of the binomial distribution. The
    answer is yes if this is below 0.02.
    """
    q = failed / drawn
    if q <= limit or limit == 0:
        return q > limit
    divergence = q * math.log(q / limit) + (q < 1 and (1 - q) * math.log((1 - q) / (1 - limit)))
    return math.exp(-drawn * divergence) < 0.02


def fingerprint(rows):
    """Tell data sets apart: the number of clips, and a checksum of their names and labels.

    A data set that has moved to another folder keeps its fingerprint.
    """
    names = "".join(f"{Path(row.name).name} {row.label} " for row in rows)
    return f"{len(rows)} clips, sum {zlib.crc32(names.encode()):08x}"
