"""What a frozen teacher says of the training images, computed once: in memory, or in npy files of the run's folder."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdkernels.methods import Seen

# What is kept in memory without being asked to; larger outputs are computed anew in every step.
IN_MEMORY = 256 * 2**20


class TeacherOutputs:
    """Rows of a teacher's outputs, by the number of the training image."""

    def __init__(self, arrays: dict[str, Any], position: Tensor, device: torch.device) -> None:
        self.arrays = arrays  # by the name of Seen's field: tensors, or arrays mapped from files
        self.position, self.device = position, device

    def rows(self, images: Tensor) -> Seen:
        """What the teacher says of some training images. What it was not asked for is None."""
        at = self.position[images]
        return Seen(*(self._take(self.arrays.get(name), at) for name in Seen._fields))

    def _take(self, array: Any, at: Tensor) -> Any:
        if array is None:
            return None
        if isinstance(array, Tensor):
            return array[at.to(array.device)]
        return torch.from_numpy(array[at.numpy()]).to(self.device)


class SeveralOutputs:
    """The logits of several teachers."""

    def __init__(self, each: Sequence[TeacherOutputs]) -> None:
        self.each = each

    def rows(self, images: Tensor) -> list[Tensor]:
        return [outputs.rows(images).logits for outputs in self.each]


def compute(
    look: Callable[[Tensor], Seen],
    uses: Sequence[str],
    batches: Callable[[Tensor], Tensor],  # indices -> images, ready for the model
    images: Tensor,  # (n,) indices into the training images
    total: int,  # how many training images there are
    device: torch.device,
    folder: Path | None = None,
) -> TeacherOutputs | None:
    """The teacher's outputs for some images; None where they are large and no folder is given.

    With a folder they lie in its npy files, one for each output. Whole files of these images that are there already
    are taken as they are.
    """
    images = images.unique()
    position = torch.full((total,), -1)
    position[images] = torch.arange(len(images))
    first = look(batches(images[:1]))
    shapes = {name: (len(images), *getattr(first, name).shape[1:]) for name in uses}
    arrays: dict[str, Any] = {}
    if folder is None:
        if sum(4 * math.prod(shape) for shape in shapes.values()) > IN_MEMORY:
            return None
        arrays = {name: torch.empty(shape, device=device) for name, shape in shapes.items()}
    elif _whole(folder, images, shapes):
        return TeacherOutputs(_mapped(folder, shapes), position, device)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "images.npy").unlink(missing_ok=True)
        arrays = {
            name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, shape)
            for name, shape in shapes.items()
        }
    at = 0
    for some in images.split(500):
        seen = look(batches(some))
        for name, array in arrays.items():
            value = getattr(seen, name).float()
            array[at : at + len(some)] = value if folder is None else value.cpu().numpy()
        at += len(some)
    if folder is not None:
        for array in arrays.values():
            array.flush()
        np.save(folder / "images.npy", images.numpy())  # last: what lies beside it is whole
        arrays = _mapped(folder, shapes)
    return TeacherOutputs(arrays, position, device)


def _whole(folder: Path, images: Tensor, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Are the outputs of just these images there?"""
    try:
        if not np.array_equal(np.load(folder / "images.npy"), images.numpy()):
            return False
        return all(np.load(folder / f"{n}.npy", mmap_mode="r").shape == shape for n, shape in shapes.items())
    except (OSError, ValueError):
        return False


def _mapped(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
