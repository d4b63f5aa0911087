"""The run of a training script: steps, log, checkpoints, resume, signals.

The script owns the training loop, and a Run is what the loop iterates over:

    run = Run(args, loader, model, optimizer, scaler, metadata)
    for epoch, batch in run:
        ...                                     # one step of the optimiser
        run.log(loss=loss, top1=top1, lr=lr)

Between two steps the Run counts, logs, checks that losses and weights are finite, saves, and stops
after a signal. The folder args.out gets checkpoint.pt and log.jsonl. `lock_folder` has locked it.
"""

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

from support.checkpoints import read_state, write_state
from support.files import writing
from support.processes import (INTERRUPTED, SIGNALS, gather, rank, run_once, say, signals_blocked,
                               world_size)

LOG_EVERY = 10                                  # steps
REQUEUE = 75                                    # exit status after a scheduler's signal
# A resumed run may change these settings. (The classes follow from the data, whose fingerprint is
# compared.)
CHANGEABLE = {"out", "workers", "save_every", "keep_every", "compile", "max_failures", "test_clips",
              "classes"}
MARK = "requeue"                                # left in OUT by a run that a signal has ended

locks = []                                      # open files, each for as long as the process lives


def lock_folder(out, args=None):
    """Make the folder of a run, keep other runs out of it, and remove the mark of the last run.

    args: the settings of a run that trains. They are compared with those of the folder's checkpoint
    before a scan of other data writes over its manifest. The lock, OUT/lock, is released when
    process 0 ends, even by SIGKILL. Raises ValueError on all processes if another run has the lock,
    if the folder cannot be written, or if the settings are others.
    """
    def lock():
        path = Path(out).resolve() / "lock"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(f"--out {out} is in use by {file.read().strip()}: wait until it has "
                             "ended, or give another --out (if that machine is gone, delete "
                             f"{path})") from None
        except OSError as error:                # as some network disks have it
            say(f"warning: {path} cannot be locked ({error.strerror}): see to it yourself that no "
                "other run has the same --out", sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        locks.append(file)
        path.with_name(MARK).unlink(missing_ok=True)
        checkpoint = Path(out, "checkpoint.pt")
        if args and checkpoint.exists():
            read_same(checkpoint, vars(args))

    run_once(lock)


def read_same(path, settings):
    """Read the checkpoint of a run. Raises ValueError if it was made with other settings."""
    state = read_state(path, ("settings", "fingerprint"))
    then = state["settings"] | {"data set": state["fingerprint"]}
    different = sorted(f"{name} was {then.get(name)} and is {value}"
                       for name, value in settings.items()
                       if name not in CHANGEABLE and value != then.get(name))
    if different:
        raise ValueError(f"{path} was made with other settings ({'; '.join(different)}): "
                         "give the former ones or another --out")
    return state


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
        processes, N = self.resume() if self.path.exists() else (None, None)
        if len(set(gather((self.epoch, self.used, self.step, self.fingerprint)))) > 1:
            raise ValueError("the processes see different checkpoints or data: "
                             f"is --out {args.out} on a file system that they share?")
        self.sampler.epoch, self.sampler.used = self.epoch, self.used
        self.last_step = self.step + len(loader)
        if self.step == self.last_step:
            say(f"{self.path} has been trained to its last step (another --out starts a new run)")
        elif self.step:
            say(f"continuing {self.path} at step {self.step} of {self.last_step}" + (
                f"; it ran on {processes} process(es), so the weights will not be the same to "
                "the bit" if processes != world_size() else ""))
            if N != self.N:
                say(f"warning: the global batch was {N} and is {self.N}, and with it the negatives "
                    "and the learning rate change", sys.stderr)

    def resume(self):
        """Load the checkpoint. Returns how many processes wrote it, and their global batch."""
        state = read_same(self.path, vars(self.args) | {"data set": self.fingerprint})
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:                     # empty if the run has not been in float16
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.used = state["position"]
        self.step = self.saved_step = state["step"]
        self.replaced, self.skipped = state["replaced"], state["skipped"]
        self.log_bytes = state["log_bytes"]
        return state["world_size"], state.get("batch", self.N)      # older ones do not have it

    def __iter__(self):
        if self.step == self.last_step:
            return
        if rank() == 0 and self.step == 0:
            self.write_line({"args": vars(self.args), **self.metadata}, "w")
        elif rank() == 0:                       # later steps run again, so their lines go
            with writing(self.log_path), open(self.log_path, "a") as log:
                log.truncate(min(self.log_bytes, log.tell()))
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
                scale = self.scaler.get_scale()
                yield self.epoch + self.used / self.N / self.sampler.steps_per_epoch, batch
                self.skipped += self.scaler.get_scale() < scale     # infinite gradients
                self.used, self.step = self.used + self.N, self.step + 1
                # The processes agree with which status to stop, if any, and process 0 says whether
                # to save. On one process a scheduler's signal (75) counts before Ctrl-C (130).
                minutes = (time.monotonic() - self.saved_at) / 60
                agreed = torch.tensor([min(statuses, default=0),
                                       rank() == 0 and minutes >= self.args.save_every])
                dist.all_reduce(agreed, dist.ReduceOp.MAX)
                self.between_steps(*agreed.tolist())

    def next_batch(self, batches):
        """Take a batch, and name the files in it that had to be replaced. Returns its tensors."""
        began = time.monotonic()
        *batch, sources = next(batches)
        self.waited += time.monotonic() - began
        if self.used + self.N > len(self.loader.dataset):
            self.epoch, self.used = self.epoch + 1, 0
        for _, failures in sources:
            self.newly_replaced += len(failures)
            for failure in failures:
                tqdm.write(f"replaced: {failure}", file=sys.stderr)
        self.files.append([path for path, _ in sources])
        return batch

    def log(self, loss, lr, **measures):
        """Note the loss of a step and other measures, scalar tensors, and its learning rate.

        A line of the log has their means over the steps since the last line and over the processes,
        and the last learning rate.
        """
        self.measures.append({name: x.detach() for name, x in ({"loss": loss} | measures).items()})
        self.rates.append(lr)

    def start_window(self):
        """Forget the steps that have been logged."""
        self.files, self.measures, self.rates = [], [], []      # of each step
        self.waited, self.newly_replaced, self.since = 0.0, 0, time.monotonic()

    def between_steps(self, stop_status, time_to_save):
        """Check and log every LOG_EVERY steps, save when it is time, and exit after a signal.

        stop_status: the exit status, or 0 to go on. time_to_save: 1 or 0. It brings a line of the
        log too.
        """
        self.bar.update()
        last, every = self.step == self.last_step, self.args.keep_every
        ends_epoch = self.used + self.N > len(self.loader.dataset)
        keep = ends_epoch and every and (self.epoch + 1) % every == 0
        log_now = (self.step % LOG_EVERY == 0 or last or keep
                   or time_to_save and self.args.save_every > 0)
        if not (log_now or stop_status):
            return
        summaries = gather(self.summary())
        self.stop_if_not_finite(summaries)
        failed = sum(summary["replaced"] for summary in summaries)
        self.replaced, self.failed = self.replaced + failed, self.failed + failed
        self.drawn += len(self.files) * self.N + failed
        too_many_failed = clearly_more(self.failed, self.drawn, self.args.max_failures)
        if log_now and rank() == 0:
            self.write_summary(summaries)
        self.start_window()
        if time_to_save or stop_status or last or keep or too_many_failed:
            self.save(keep, requeue=stop_status == REQUEUE)
        if stop_status:
            cause = "Ctrl-C" if stop_status == INTERRUPTED else "a signal"
            self.bar.close()
            say(f"stopped by {cause}, saved at step {self.step} of {self.last_step}: the same "
                "command continues from that step")
            sys.exit(stop_status)
        if too_many_failed:
            raise ValueError(f"{self.failed} of the {self.drawn} clips drawn since the start could "
                             "not be read, clearly more than --max-failures "
                             f"{self.args.max_failures} of them: see the causes above, check the "
                             f"disk and the manifest; step {self.step} is saved")

    def summary(self):
        """What this process tells the others of the steps since the last line of the log."""
        measures = {name: torch.stack([step[name] for step in self.measures])
                    for name in self.measures[0]}
        finite = torch.stack([x.isfinite().all() for x in self.model.parameters()]).all().item()
        return {"losses": measures["loss"].tolist(), "finite": finite,
                "replaced": self.newly_replaced,
                "means": {name: x.mean().item() for name, x in measures.items()}}

    def stop_if_not_finite(self, summaries):
        """Stop all processes if a loss or a weight is not finite."""
        state = (f"the checkpoint of step {self.saved_step} is kept" if self.saved_step
                 else "there is no checkpoint yet")
        advice = f"{state}; try a lower --lr and another --out"
        for n, losses in enumerate(zip(*(summary["losses"] for summary in summaries))):
            if all(map(math.isfinite, losses)):
                continue
            step, files = self.step - len(self.files) + n + 1, sum(gather(self.files[n]), [])
            if rank() == 0:
                self.write_line({"step": step, "losses": losses, "files": files})
            more = f" and {len(files) - 8} more, which log.jsonl names" if len(files) > 8 else ""
            loss = next(x for x in losses if not math.isfinite(x))
            raise FloatingPointError(f"loss {loss} at step {step}, learning rate "
                                     f"{self.rates[n]:.4g}, batch {', '.join(files[:8])}{more}: "
                                     f"{advice}, or look at these files")
        if not all(summary["finite"] for summary in summaries):
            raise FloatingPointError(f"weights that are not finite after step {self.step}, "
                                     f"learning rate {self.rates[-1]:.4g}: {advice}")

    def write_summary(self, summaries):
        """Write a line of the log."""
        steps, seconds = len(self.files), time.monotonic() - self.since
        means = {name: round(sum(summary["means"][name] for summary in summaries) / world_size(), 5)
                 for name in summaries[0]["means"]}
        epoch = self.epoch + self.used / self.N / self.sampler.steps_per_epoch
        speed, wait = round(steps * self.N / seconds, 2), round(self.waited / seconds, 3)
        self.write_line({"step": self.step, "epoch": round(epoch, 3), "batch": self.N, **means,
                         "lr": self.rates[-1], "clips_per_s": speed, "wait": wait,
                         "replaced": self.replaced, "skipped": self.skipped})
        self.bar.set_postfix(loss=f"{means['loss']:.3f}", clips_s=speed, wait=f"{wait:.0%}")

    def write_line(self, record, mode="a"):
        """Write one line of JSON to the log."""
        with writing(self.log_path), open(self.log_path, mode) as log:
            log.write(json.dumps(record) + "\n")

    def save(self, keep=False, requeue=False):
        """Write the checkpoint. The other processes wait until it is on the disk.

        keep: keep it under the number of its epoch too. requeue: leave the mark for a scheduler.
        """
        if rank() == 0:
            last = self.step == self.last_step
            state = dict(settings=vars(self.args), fingerprint=self.fingerprint, step=self.step,
                         position=(self.args.epochs, 0) if last else (self.epoch, self.used),
                         world_size=world_size(), batch=self.N, replaced=self.replaced,
                         skipped=self.skipped, log_bytes=self.log_path.stat().st_size,
                         model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                         scaler=self.scaler.state_dict())
            self.write(state, self.path.name)
            if keep:
                self.write(state, f"checkpoint-{self.epoch + 1}.pt")
            if requeue:
                self.path.with_name(MARK).touch()
        gather(None)
        self.saved_at, self.saved_step = time.monotonic(), self.step

    def write(self, state, name):
        """Write a state to the folder of the run, for torch.load. Only process 0 does."""
        if rank() == 0:
            write_state(state, self.path.with_name(name))


@contextmanager
def catch_signals():
    """Yield a list that receives the exit statuses that SIGNALS ask for. After Ctrl-C the next
    signal ends the process at once."""
    statuses = []

    def receive(number, frame):
        if INTERRUPTED in statuses:
            os.write(2, b"ended by a signal after Ctrl-C: the same command continues from the last "
                        b"checkpoint, if there is one\n")
            os._exit(INTERRUPTED)
        status = INTERRUPTED if number == signal.SIGINT else REQUEUE
        if rank() == 0 and status not in statuses:
            ends = b" (Ctrl-C again ends at once, at the last checkpoint)"
            os.write(2, b"\nsaving after this step" + ends * (status == INTERRUPTED) + b"\n")
        statuses.append(status)

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
