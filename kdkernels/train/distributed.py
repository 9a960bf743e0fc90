"""Several processes on one batch: who has which rows, sums and features over all, batch normalisation over all.

With equal parts the result is a single process's, to rounding: losses that are means are weighted by their rows,
losses of a batch's distribution see every process's features, and so do the statistics of batch normalisation.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def share_of(count: int, rank: int, world: int) -> slice:
    """The rows of one of `world` parts: as equal as can be, the first ones longer."""
    size, longer = divmod(count, world)
    start = rank * size + min(rank, longer)
    return slice(start, start + size + (rank < longer))


def sum_over_processes(x: Tensor) -> Tensor:
    """Without a gradient."""
    if not dist.is_initialized():
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x


def gather_rows(x: Tensor, sizes: list[int]) -> Tensor:  # (sizes[rank], ...) -> (sum of sizes, ...)
    """All processes' rows, in the processes' order. Gradients flow back to whose rows they are."""
    if not dist.is_initialized():
        return x
    rank = dist.get_rank()
    before, after = sum(sizes[:rank]), sum(sizes[rank + 1 :])
    place = (x.new_zeros(before, *x.shape[1:]), x, x.new_zeros(after, *x.shape[1:]))
    return _AllReduce.apply(torch.cat(place))


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over all processes, on any device (torch's own, SyncBatchNorm, is for GPUs alone)."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # whatever the layer that it stands for takes

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()
        places = [0, *range(2, x.dim())]
        # Sums of the values and their squares about the running mean, which keeps the squares from cancelling.
        shape = (1, -1, *[1] * (x.dim() - 2))
        running = self.running_mean
        origin = x.new_zeros(x.shape[1]) if running is None else running.to(x.dtype, copy=True)
        shifted = x - origin.view(shape)
        count = x.new_full((1,), x.numel() / x.shape[1])
        sums = torch.cat([shifted.sum(places), shifted.square().sum(places), count])
        sums = _AllReduce.apply(sums)
        channels = x.shape[1]
        total = sums[-1].detach()
        mean = sums[:channels] / total
        variance = (sums[channels:-1] / total - mean.square()).clamp_min(0)
        with torch.no_grad():
            if self.running_mean is not None and self.running_var is not None:
                assert self.num_batches_tracked is not None
                self.num_batches_tracked.add_(1)
                rate = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
                self.running_mean.lerp_((mean + origin).to(self.running_mean.dtype), rate)
                self.running_var.lerp_((variance * total / (total - 1)).to(self.running_var.dtype), rate)
        y = (shifted - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)


class _AllReduce(torch.autograd.Function):
    """The sum over processes; its gradient is summed too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


def use_global_batch_norm(learner: nn.Module) -> None:
    """Every batch normalisation that learns takes its statistics over all processes. Frozen models keep theirs."""
    models: list[nn.Module] = learner.frozen()  # type: ignore[operator]
    frozen = {id(module) for model in models for module in model.modules()}
    for module in learner.modules():
        if id(module) not in frozen and type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = GlobalBatchNorm
