"""What every loss over rows of logits checks, and how it brings its arguments to (M, N) and (M,)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from kdkernels.backend import holds_label

Temperature = float | Tensor
# The classes that there are: all, the first n, or (start, stop).
Range = int | tuple[int, int] | None
REDUCTIONS = ("none", "sum", "batchmean")


def check_student(student: Any) -> None:
    if not isinstance(student, Tensor):
        raise TypeError(f"student must be a tensor of logits, got {kind_of(student)}")
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"student must have shape (..., N) with N >= 1 classes, got {tuple(student.shape)}")


def refuse_logits(student: Any, teacher: Any, name: str = "teacher") -> NoReturn:
    check_student(student)
    if not isinstance(teacher, Tensor):
        raise TypeError(f"{name} must be a tensor of logits, got {kind_of(teacher)}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"{name} must have the student's shape {tuple(student.shape)}, got {tuple(teacher.shape)} (where only "
            "the numbers of classes differ, a loss with valid_classes can be told which to compare)"
        )
    if teacher.dtype != student.dtype:
        raise TypeError(f"{name} must have the student's dtype {student.dtype}, got {teacher.dtype}")
    raise ValueError(f"{name} must be on the student's device {student.device}, got {teacher.device}")


def check_logits(
    student: Any, teacher: Any, valid_classes: Range, teacher_valid_classes: Range
) -> tuple[int, int, int]:
    """Where the student's and the teacher's valid classes start, and how many they are. The teacher may be None."""
    if valid_classes is None and teacher_valid_classes is None:
        if not (
            isinstance(student, Tensor)
            and student.dim()
            and student.shape[-1]
            and (
                teacher is None
                or (
                    isinstance(teacher, Tensor)
                    and student.shape == teacher.shape
                    and student.dtype == teacher.dtype
                    and student.device == teacher.device
                )
            )
        ):
            refuse_logits(student, teacher)
        return 0, 0, student.shape[-1]
    for name, side in (("student", student), ("teacher", teacher)):
        if not isinstance(side, Tensor):
            raise TypeError(f"{name} must be a tensor of logits, got {kind_of(side)}")
        if side.dim() == 0:
            raise ValueError(f"{name} must have shape (..., N), got {tuple(side.shape)}")
    if (
        student.shape[:-1] != teacher.shape[:-1]
        or student.dtype != teacher.dtype
        or student.device != teacher.device
    ):
        refuse_logits(student, teacher)
    return check_ranges(valid_classes, teacher_valid_classes, student.shape[-1], teacher.shape[-1])


def check_ranges(
    valid_classes: Any, teacher_valid_classes: Any, classes: int, teacher_classes: int
) -> tuple[int, int, int]:
    """Where the student's and the teacher's valid classes start, and how many they are."""
    start, stop = check_range(valid_classes, "valid_classes", classes)
    teacher_start, teacher_stop = start, stop
    if teacher_valid_classes is not None:
        teacher_start, teacher_stop = check_range(
            teacher_valid_classes, "teacher_valid_classes", teacher_classes, "teacher"
        )
    elif stop > teacher_classes:
        raise ValueError(
            f"valid_classes ({start}, {stop}) must lie in the teacher's {teacher_classes} classes too, where "
            "teacher_valid_classes is not given"
        )
    if teacher_stop - teacher_start != stop - start:
        raise ValueError(
            f"valid_classes and teacher_valid_classes must be equally long, got ({start}, {stop}) and "
            f"({teacher_start}, {teacher_stop})"
        )
    return start, teacher_start, stop - start


def check_range(value: Any, name: str, classes: int, side: str = "student") -> tuple[int, int]:
    """(start, stop) in a row of `classes`, which are the `side`'s."""
    if value is None:
        return 0, classes
    wrong = f"{name} must be None, a number of classes or (start, stop), got {value!r}"
    if isinstance(value, bool) or not isinstance(value, int | tuple | list):
        raise TypeError(wrong)
    bounds = (0, value) if isinstance(value, int) else tuple(value)
    if len(bounds) != 2 or not all(isinstance(x, int) for x in bounds):
        raise TypeError(wrong)
    start, stop = bounds
    if not 0 <= start < stop <= classes:
        raise ValueError(
            f"{name} must be inside the {side}'s {classes} classes, with at least one of them, got {value!r}"
        )
    return start, stop


def check_labels(
    labels: Any,
    ignore_index: int,
    student: Tensor,
    mask: Tensor | None,
    start: int,
    classes: int,
    *,
    look: bool,
) -> tuple[Tensor, Tensor | None]:
    """The labels counted from `start`, and which rows they leave in (None: all). Values are looked at on the CPU
    only (a GPU would have to wait, and gives NaN), where `look` says so."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be an integer tensor, got {kind_of(labels)}")
    if labels.shape != student.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of the rows {tuple(student.shape[:-1])}, got {tuple(labels.shape)}"
        )
    if labels.device != student.device:
        raise ValueError(f"labels must be on the student's device {student.device}, got {labels.device}")
    labels = labels.long()  # first: an ignore_index of -100 is no number of uint8
    counts = None if holds_label(labels, ignore_index) is False else labels != ignore_index
    if look and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (labels < start) | (labels >= start + classes)
        for counted in (counts, mask):
            wrong = wrong if counted is None else wrong & counted
        if wrong.any():
            raise ValueError(
                f"labels must be {ignore_index} (ignore_index) or in [{start}, {start + classes}), "
                f"got {labels[wrong][0].item()}"
            )
    return (labels - start if start else labels), counts


def rows_that_count(
    student: Tensor, mask: Tensor | None, labels: Tensor | None, ignore_index: int
) -> Tensor | None:
    """The rows of `student` that the mask and the labels leave in (None: all)."""
    counts = None if mask is None else check_mask(mask, student)
    if labels is None:
        return counts
    labelled = labels != ignore_index
    return labelled if counts is None else counts & labelled


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_fraction(value: Any, name: str) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {kind_of(value)}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_number(value: Any, name: str) -> float:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {kind_of(value)}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def check_temperature(value: Any, name: str, student: Tensor, dtype: torch.dtype) -> Temperature:
    if not isinstance(value, Tensor):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"{name} must be a float or a tensor, got {kind_of(value)}") from None
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
        return number
    check_temperature_tensor(value, name)
    return over_rows(value, name, student).to(dtype)


def check_temperatures(
    temperature: Any, teacher_temperature: Any, student: Tensor, dtype: torch.dtype
) -> tuple[Temperature, Temperature]:
    """The student's and the teacher's, which is the same unless it is given."""
    temperature = check_temperature(temperature, "temperature", student, dtype)
    if teacher_temperature is None:
        return temperature, temperature
    return temperature, check_temperature(teacher_temperature, "teacher_temperature", student, dtype)


def check_temperature_tensor(value: Tensor, name: str) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a float or a floating tensor, got {kind_of(value)}")
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = value.detach()[~((value > 0) & (value < math.inf))]
        if bad.numel():
            raise ValueError(f"{name} must be positive and finite, got {bad[0].item()}")


def check_mask(mask: Any, student: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {kind_of(mask)}")
    return over_rows(mask, "mask", student)


def check_weights(weights: Any, student: Tensor, dtype: torch.dtype, name: str = "weights") -> Tensor:
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {kind_of(weights)}")
    return over_rows(weights, name, student).to(dtype)


def over_rows(value: Tensor, name: str, student: Tensor) -> Tensor:
    """`value` expanded to the student's rows."""
    rows = student.shape[:-1]
    if value.device != student.device:
        raise ValueError(f"{name} must be on the student's device {student.device}, got {value.device}")
    if value.dim() > len(rows) or any(
        have not in (1, want) for have, want in zip(reversed(value.shape), reversed(rows))
    ):
        raise ValueError(f"{name} must broadcast to the rows {tuple(rows)}, got shape {tuple(value.shape)}")
    return value.expand(rows)


def kind_of(value: Any) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"{value!r} ({type(value).__name__})"


def as_matrix(
    logits: Tensor,
) -> Tensor:  # (..., N) -> (M, N) with classes side by side, a view where it can be
    if logits.dim() != 2:
        logits = logits.reshape(-1, logits.shape[-1])
    return logits if logits.stride(1) == 1 else logits.contiguous()


def as_vectors(*values: Any) -> Sequence[Any]:  # rows -> (M,) contiguous; anything that is no tensor as it is
    return [x.reshape(-1).contiguous() if isinstance(x, Tensor) else x for x in values]


def scale_of_rows(
    weights: Tensor | None, mask: Tensor | None, reduction: str, rows: int, dtype: torch.dtype
) -> tuple[Tensor | None, float]:
    """What each row is multiplied with on its way into the loss: (rows,) values, or one for all."""
    if mask is None:
        scale = 1 / max(rows, 1) if reduction == "batchmean" else 1.0
        return (None, scale) if weights is None else (weights * scale, 1.0)
    if weights is not None:
        weights = torch.where(mask, weights, 0)
    if reduction != "batchmean":
        return weights, 1.0
    each = mask.sum().clamp(min=1).to(dtype).reciprocal()
    return (each.expand(rows).contiguous() if weights is None else weights * each), 1.0


def reduce_rows(rows: Tensor, mask: Tensor | None, weights: Tensor | None, reduction: str) -> Tensor:
    """What a reference makes of its rows' losses."""
    if mask is not None:
        rows = torch.where(mask, rows, 0)
        weights = None if weights is None else torch.where(mask, weights, 0)
    if weights is not None:
        rows = rows * weights
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.sum() / (max(rows.numel(), 1) if mask is None else mask.expand(rows.shape).sum().clamp(min=1))


def split_temperatures(a: Temperature, b: Temperature) -> tuple[Tensor | None, Tensor | None, float, float]:
    """Two temperatures as the op takes them: tensors or None, then floats."""
    if isinstance(a, Tensor):
        return (a, b, 1.0, 1.0) if isinstance(b, Tensor) else (a, None, 1.0, b)
    return (None, b, a, 1.0) if isinstance(b, Tensor) else (None, None, a, b)
