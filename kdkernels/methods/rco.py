"""RCO (Jin et al., arXiv 1904.09149): the teacher's own checkpoints, early to converged, as an ordered course of
teachers. When to switch is not known from the paper: here the epochs are divided equally unless `epochs` says.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.methods.deployable import check_fit
from kdkernels.methods.kd import KD

Anchor = Mapping[str, Tensor] | str | os.PathLike[str]


class RCO(KD):
    """KD from the teacher as it was at each of `anchors` (state dicts, or files of them), one after the other.

    ``epochs`` gives, for each anchor, the epoch (from 1) at which it takes over. The models' weights change with it:
    what is kept of a teacher's outputs is good for one anchor only.

    Raises ValueError of an anchor that is missing, damaged or another model's; the teacher is then as it was.
    """

    uses: tuple[str, ...] = ()  # another teacher's outputs with every anchor: none to be kept

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        anchors: Sequence[Anchor],
        epochs: Sequence[int] | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(student, teacher, **rest)
        if not len(anchors):
            raise ValueError("anchors must be one state dict of the teacher at least, got none")
        if epochs is not None and (
            len(epochs) != len(anchors) or epochs[0] != 1 or sorted(set(epochs)) != list(epochs)
        ):
            raise ValueError(
                f"epochs must be {len(anchors)} rising numbers, the first 1, one for each anchor, got {list(epochs)}"
            )
        self.anchors, self.epochs = list(anchors), epochs
        self.current: int | None = None
        for number in range(len(self.anchors)):
            self._read(number)  # what does not fit shows now, not epochs later

    def anchor_of(self, epoch: int, epochs: int) -> int:
        """Which anchor teaches in an epoch."""
        if self.epochs is not None:
            return sum(first <= epoch for first in self.epochs) - 1
        return min((epoch - 1) * len(self.anchors) // epochs, len(self.anchors) - 1)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        number = self.anchor_of(epoch, epochs)
        if number == self.current:
            return
        self.teacher.load_state_dict(self._read(number))
        self.current = number

    def _read(self, number: int) -> Mapping[str, Tensor]:
        """An anchor that fits the teacher."""
        anchor, name = self.anchors[number], f"anchor {number}"
        if not isinstance(anchor, Mapping):
            name = f"{name}, {anchor},"
            if not Path(anchor).is_file():
                raise ValueError(f"{name} is no file")
            try:
                anchor = torch.load(anchor, map_location="cpu", weights_only=True)
            except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
                raise ValueError(f"{name} is damaged or no file of torch.save") from None
            if not isinstance(anchor, Mapping):
                raise ValueError(f"{name} must hold a state dict, got {type(anchor).__name__}")
        check_fit(self.teacher, anchor, f"{name} is not of this teacher")
        return anchor
