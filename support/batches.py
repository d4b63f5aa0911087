"""The order of training: which clips make a batch, on which process, after which others."""

import numpy as np
from torch.utils.data import Sampler


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
