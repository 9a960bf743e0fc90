"""Counts what Triton's interpreter moves: bytes loaded and stored, and launches."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton.runtime import interpreter


@dataclass
class Traffic:
    """Bytes that masked loads and stores really touched, and the number of kernels started."""

    loaded: int = 0
    stored: int = 0
    launches: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored


def is_interpreted(kernel: object) -> bool:
    return isinstance(kernel, interpreter.InterpretedFunction)


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Inside the block, every interpreted kernel adds to the Traffic that the block receives."""
    traffic = Traffic()
    builder = interpreter.InterpreterBuilder
    load, store, launch = (
        builder.create_masked_load,
        builder.create_masked_store,
        interpreter.GridExecutor.__call__,
    )

    def size(pointers: Any, mask: Any) -> int:
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.loaded += size(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.stored += size(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        traffic.launches += 1
        return launch(self, *args, **kwargs)

    with (
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(interpreter.GridExecutor, "__call__", counted_launch),
    ):
        yield traffic
