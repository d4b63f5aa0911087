"""What the layers of a model need before it is trained, in several processes or on CPUs.

BatchNorm takes the statistics of the clips of all processes (paper silent; GDT), on CPUs too, where
nn.SyncBatchNorm does not work. Otherwise training would depend on the number of processes. This
file needs torch alone.
"""

import torch
import torch.distributed as dist
from torch import nn


def prepare_layers(model, device):
    """Return the model, ready to be trained on `device`. Names and values of its tensors stay."""
    for module in model.modules() if device.type == "cpu" else ():
        if isinstance(module, nn.Conv3d) and module.padding[0]:
            module.register_forward_pre_hook(pad_first)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = CpuSyncBatchNorm
    return model


def pad_first(conv, inputs):
    """Zero-pad a clip of two frames before a convolution in time. The result is the same, but where
    the convolution pads, oneDNN 3.12 (torch 2.14) returns a bfloat16 weight gradient that holds
    uninitialised memory. tests/test_models.py shows it."""
    conv.padding_mode = "constant" if inputs[0].shape[2] == 2 else "zeros"


class CpuSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """x (n, C, ...) -> the same shape. Each process gives as many x as the others."""

    def _check_input_dim(self, x):
        """Any number of axes will do."""

    @torch.compiler.disable                 # torch 2.14 writes C++ for this that does not compile
    def forward(self, x):
        if not self.training:
            return super().forward(x)
        axes = [0, *range(2, x.dim())]
        exact = x if x.dtype == torch.float64 else x.float()            # (n, C, ...)
        var, mean = torch.var_mean(exact, axes, correction=0)           # (C,) x 2, of this process
        # The variance of all is the mean of var + (mean - m)^2, less (mean of all - m)^2, for any
        # m. With an m that is close to the means no digits are lost.
        m = self.running_mean
        mean, square = AllMean.apply(torch.stack([mean - m, var + (mean - m) ** 2]))
        mean, var = mean + m, square - mean ** 2                        # (C,) x 2, of all
        with torch.no_grad():
            n = dist.get_world_size() * x.numel() / x.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()                  # (C,)
        shape = [1, -1, *[1] * (x.dim() - 2)]
        return (exact * scale.view(shape) + (self.bias - mean * scale).view(shape)).to(x.dtype)


class AllMean(torch.autograd.Function):
    """The mean over all processes, with its exact backward."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x / dist.get_world_size()

    backward = forward                      # each loss depends on the x of all processes alike
