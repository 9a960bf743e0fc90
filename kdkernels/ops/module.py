"""What every loss is as a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from kdkernels.ops.rows import check_reduction


class LossModule(nn.Module):
    """A loss as a module: the options of `function` are given once, those in `per_call` with each call. An option that
    is an ``nn.Parameter`` (a learnable temperature) is a parameter of the module."""

    function: ClassVar[Callable[..., Any]]
    per_call: ClassVar[tuple[str, ...]] = ("mask", "weights")

    def __init__(self, **options: Any) -> None:
        super().__init__()
        parameters = inspect.signature(type(self).function).parameters.values()
        known = {
            p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in self.per_call
        }
        for name in options:
            if name not in known:
                raise TypeError(f"{type(self).__name__} takes {', '.join(known)}; got {name!r}")
        check_reduction(options.get("reduction", "batchmean"))
        for name, default in known.items():
            setattr(self, name, options.get(name, default))
        self._names, self._given = tuple(known), tuple(options)

    def forward(self, *inputs: Any, **given: Tensor | None) -> Any:
        for name in given:
            if name not in self.per_call:
                raise TypeError(
                    f"{type(self).__name__} takes {', '.join(self.per_call)} with a call; got {name!r}"
                )
        return type(self).function(*inputs, **given, **{name: getattr(self, name) for name in self._names})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._given)
