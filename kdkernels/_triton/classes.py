"""The samples of each class, without a wait for a device."""

import torch


def classes_of(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # (B, n) -> (B, n), (B, n + 1)
    """The samples in the order of their classes, and where each class starts; those that are not there, at n."""
    ordered, order = labels.sort(dim=1, stable=True)
    number = torch.zeros_like(ordered)
    torch.cumsum(ordered[:, 1:] != ordered[:, :-1], 1, out=number[:, 1:])
    each = torch.arange(labels.shape[1] + 1, device=labels.device).expand(labels.shape[0], -1)
    return order, torch.searchsorted(number, each.contiguous())
