"""Several processes on one batch: normalisation over all of it, features and sums of all, equal shares."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

pytest.importorskip("lightning_fabric", reason="kdkernels[train] is not installed")

from kdkernels.train.distributed import (
    GlobalBatchNorm,
    gather_rows,
    share_of,
    sum_over_processes,
)

WORLD = 2


@pytest.mark.parametrize("count", [0, 1, 5, 6, 100])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_are_the_whole_and_as_equal_as_can_be(count, world):
    parts = [share_of(count, rank, world) for rank in range(world)]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1


def problem() -> tuple[nn.BatchNorm2d, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 5 + 3 * torch.randn(7, 4, 3, 2, dtype=torch.float64, generator=generator)
    weight = torch.randn(7, 4, 3, 2, dtype=torch.float64, generator=generator)
    norm = nn.BatchNorm2d(4).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2, generator=generator)
        norm.bias.uniform_(-1, 1, generator=generator)
    return norm, x, weight


def one_process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    norm, x, weight = problem()
    norm.__class__ = GlobalBatchNorm
    mine = share_of(len(x), rank, WORLD)  # four rows and three
    own = x[mine].clone().requires_grad_()
    out = norm(norm(own))  # a second pass: its statistics start from what the first one left
    (out * weight[mine]).sum().backward()
    for parameter in norm.parameters():
        dist.all_reduce(parameter.grad)
    torch.save(
        {
            "out": out.detach(),
            "grad": own.grad,
            "weight": norm.weight.grad,
            "bias": norm.bias.grad,
            "buffers": dict(norm.named_buffers()),
        },
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def test_batch_normalisation_over_processes_is_that_of_the_whole_batch(tmp_path):
    multiprocessing.spawn(one_process, (str(tmp_path),), WORLD)
    norm, x, weight = problem()
    x.requires_grad_()
    out = norm(norm(x))
    (out * weight).sum().backward()
    each = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(torch.cat([one["out"] for one in each]), out.detach(), **close)
    torch.testing.assert_close(torch.cat([one["grad"] for one in each]), x.grad, **close)
    for one in each:
        torch.testing.assert_close(one["weight"], norm.weight.grad, **close)
        torch.testing.assert_close(one["bias"], norm.bias.grad, **close)
        for name, buffer in norm.named_buffers():
            torch.testing.assert_close(one["buffers"][name], buffer, **close)


def gathering(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    x = torch.arange(6, dtype=torch.float64).view(3, 2)
    own = (x[:2] if rank == 0 else x[2:]).clone().requires_grad_()
    every = gather_rows(own, [2, 1])
    ((rank + 1) * every.square().sum()).backward()
    total = sum_over_processes(torch.tensor(rank + 1))
    torch.save({"every": every.detach(), "grad": own.grad, "total": total}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_rows_are_gathered_and_gradients_go_back(tmp_path):
    multiprocessing.spawn(gathering, (str(tmp_path),), WORLD)
    x = torch.arange(6, dtype=torch.float64).view(3, 2)
    each = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for one in each:
        assert torch.equal(one["every"], x)
        assert one["total"] == 3
    # Both processes' losses, 1 and 2 times the sum of squares, reach every row.
    assert torch.equal(torch.cat([one["grad"] for one in each]), 3 * 2 * x)


def test_one_process_has_it_all():
    x = torch.arange(4.0)
    assert gather_rows(x, [4]) is x
    assert sum_over_processes(x) is x
