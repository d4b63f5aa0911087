"""Which clips make a batch, on which process, after which others, and what is done if one fails.

A dataset of data.py has rows, a seed, draw(row, generator) to train and read(row) to evaluate. Both
return (video, audio or label), or raise ValueError with the path and the cause.
"""

import sys

import numpy as np
import torch
from torch.utils.data import Sampler, get_worker_info
from tqdm import tqdm

from support.processes import gather, rank, signals_blocked

TRIES = 10                              # files in a row that may fail before a run stops


class TrainingBatches(Sampler):
    """Batches of keys (epoch, index) for one of several processes, to the end of the last epoch.

    Each epoch is a permutation by (seed, epoch), which the processes share out. Clips that do not
    fill a batch on every process are left to other epochs. `epoch` and `used` say where to begin:
    `used` clips of that epoch have been used, by whatever number of processes.
    """

    def __init__(self, clips, batch_size, epochs=1, seed=0, rank=0, world_size=1):
        self.clips, self.batch_size, self.epochs, self.seed = clips, batch_size, epochs, seed
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = clips // (batch_size * world_size)
        self.epoch = self.used = 0

    def __len__(self):
        if self.epoch >= self.epochs:
            return 0
        begun = (self.clips - self.used) // (self.batch_size * self.world_size)
        return begun + (self.epochs - self.epoch - 1) * self.steps_per_epoch

    def __iter__(self):
        used = self.used
        for epoch in range(self.epoch, self.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.clips)[used:]
            N = self.batch_size * self.world_size
            order = order[:len(order) // N * N][self.rank::self.world_size]
            for batch in order.reshape(-1, self.batch_size).tolist():
                yield [(epoch, index) for index in batch]
            used = 0


def draw_or_replace(dataset, epoch, index):
    """Draw a training clip of the file `index`: (*dataset.draw(...), (name, failures)).

    Another file replaces one that fails. name tells the row that was read, and failures are the
    causes of the others. Raises ValueError if 10 files in a row fail.
    """
    seed = np.random.SeedSequence([dataset.seed, epoch, index]).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(seed))
    failures = []
    while len(failures) < TRIES:
        row = dataset.rows[index]
        try:
            return *dataset.draw(row, generator), (row.name, failures)
        except ValueError as error:
            failures.append(str(error))
            index = int(torch.randint(len(dataset.rows), (), generator=generator))
    raise ValueError(f"{TRIES} files in a row failed, the last: {failures[-1]}")


def read_or_name(dataset, index):
    """The evaluation clips of the file `index`: (*dataset.read(...), (index, None)).

    If the file fails, that is None, None, (index, "path: cause").
    """
    try:
        return *dataset.read(dataset.rows[index]), (index, None)
    except ValueError as error:
        return None, None, (index, str(error))


def collate(samples):
    """[(video, audio or label, source)] -> video (B, ...), audio (B, ...) or labels (B,), [source].

    A sample without a video adds its source alone. If no sample has one, the first two are None. A
    loading process puts them into shared memory here: the DataLoader would do so later, in a thread
    whose errors nobody hears (torch 2.14). Raises ValueError if that memory is full.
    """
    sources = [sample[2] for sample in samples]
    samples = [sample for sample in samples if sample[0] is not None]
    if not samples:
        return None, None, sources
    video, second, _ = zip(*samples)
    batch = torch.stack(video), torch.stack([torch.as_tensor(x) for x in second])
    if get_worker_info():
        try:
            batch = [x.share_memory_() for x in batch]
        except RuntimeError as error:
            raise ValueError("the shared memory (/dev/shm) is full: give more (to Docker by "
                             "--shm-size=32g), or start fewer loading processes (--workers)"
                             ) from error
    return *batch, sources


def evaluation_batches(loader, max_failures):
    """Yield this process's share of an evaluation, with a progress bar.

    loader: of data.make_loader. A batch is video (B, ...), audio (B, ...) or labels (B,), and a
    list of the B indices. A video that fails is named on stderr and left out. Raises ValueError if
    more than the share `max_failures` of all videos fail.
    """
    def stop_if_too_many():
        if len(causes) > max_failures * len(loader.dataset):
            raise ValueError(f"{len(causes)} of {len(loader.dataset)} videos failed, more than a "
                             f"share of {max_failures:g}, the last: {causes[-1]}; check the disk, "
                             "give --data if the videos have moved, mend these files or take them "
                             "out of the data, or let more fail (--max-failures of retrieval.py "
                             "and finetune.py)")

    causes = []
    with signals_blocked():
        batches = iter(loader)              # starts the loading processes
    for video, second, sources in tqdm(batches, "evaluating", len(loader), unit="batch",
                                       disable=rank() > 0):
        for index, cause in sources:
            if cause:
                causes.append(cause)
                tqdm.write(f"failed: {cause}", file=sys.stderr)
        stop_if_too_many()
        if video is not None:
            yield video, second, [index for index, cause in sources if not cause]
    causes = sum(gather(causes), [])
    stop_if_too_many()


def gather_results(found, what):
    """Put together what all processes have found about the files of an evaluation.

    found: {index of a file: tensor (...)} of this process. Each file has one index, so none counts
    twice. what: words for an error.
    Returns (n, ...) of the n files that were read, on the CPU, and their indices in order. Raises
    ValueError if no file was read, or if a number is not finite.
    """
    own = (list(found), torch.stack([*found.values()]).cpu().numpy()) if found else ((), ())
    everywhere = {n: x for part in gather(own) for n, x in zip(*part)}
    if not everywhere:
        raise ValueError("none of the files could be read: see the causes above")
    read = sorted(everywhere)
    results = torch.from_numpy(np.stack([everywhere[n] for n in read]))
    if not torch.isfinite(results).all():
        raise ValueError(f"{what} are not finite: the training has diverged, train anew with a "
                         "lower --lr")
    return results, read
