"""What a method ships: the student, with the connector and the head that its logits need, as one module."""

from __future__ import annotations

import copy
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdkernels.methods.connectors import make_connector, name_of
from kdkernels.methods.network import Keep, find_classifier, without_hooks

FORMAT = "kdkernels.deployable 1"


class Cost(NamedTuple):
    """What a module takes: parameters, and floating-point operations for one image (a multiply-add is two)."""

    parameters: int
    flops: int


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: what stood at `path` stays until the new bytes are on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not say of which file
        raise
    finally:
        temporary.unlink(missing_ok=True)


class Deployable(nn.Module):
    """A student ready to be shipped: images in, logits out. A copy: training on does not change it.

    Without `paths` it is the student as it is. With them the student's own classifier is taken out, and each path is a
    connector of the last map and a classifier of the connector's mean; the logits are the paths' mean.
    """

    def __init__(
        self,
        student: nn.Module,
        paths: Sequence[tuple[nn.Module, nn.Linear]] = (),
        *,
        classifier: str | None = None,
        map: str | None = None,
    ) -> None:
        super().__init__()
        self.student = without_hooks(copy.deepcopy(student))
        self.connectors = nn.ModuleList(copy.deepcopy(connector) for connector, _ in paths)
        self.classifiers = nn.ModuleList(without_hooks(copy.deepcopy(head)) for _, head in paths)
        self.classifier_name, self.map_name = classifier, map
        self._keep = Keep()
        if paths:
            name, _ = find_classifier(self.student, "student", classifier)
            self.classifier_name = name
            parent, _, child = name.rpartition(".")
            setattr(self.student.get_submodule(parent), child, nn.Identity())
            # Without maps, what the classifier would have got.
            self.student.get_submodule(name if map is None else map).register_forward_hook(self._keep)

    def forward(self, images: Tensor) -> Tensor:  # (M, N)
        if not len(self.connectors):
            return self.student(images)
        self._keep.ask()
        try:
            self.student(images)
        finally:
            seen = self._keep.take()
        assert seen is not None
        x = seen[1] if self.map_name is not None else seen[1][:, :, None, None]
        logits = [
            classify(connector(x), classifier)
            for connector, classifier in zip(self.connectors, self.classifiers)
        ]
        return logits[0] if len(logits) == 1 else torch.stack(logits).mean(0)

    def cost(self, images: Tensor) -> Cost:
        """Its parameters, and the floating-point operations for the first of `images` (M, …)."""
        from torch.utils.flop_counter import FlopCounterMode

        training = self.training
        self.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self(images[:1])
        self.train(training)
        return Cost(sum(p.numel() for p in self.parameters()), counter.get_total_flops())

    def save(self, path: str | os.PathLike[str], **about: Any) -> None:
        """Write it as safetensors, whole or not at all; `about` (JSON) is kept with it. `load_deployable` reads it."""
        save = _safetensors("safetensors.torch").save
        structure = {
            "connectors": [
                {"kind": name_of(connector), **getattr(connector, "spec", {})}
                for connector in self.connectors
            ],
            "classifiers": [
                [head.in_features, head.out_features, head.bias is not None] for head in self.classifiers
            ],
            "classifier": self.classifier_name,
            "map": self.map_name,
            "about": about,
        }
        # Buffers that are one tensor under two names, and views, are written as tensors of their own.
        tensors = {
            name: value.detach().cpu().clone().contiguous() for name, value in self.state_dict().items()
        }
        write_atomically(Path(path), save(tensors, {"format": FORMAT, "structure": json.dumps(structure)}))


def classify(maps: Tensor, classifier: nn.Module) -> Tensor:  # (M, C, H, W) -> (M, N)
    """The logits of a classifier behind the mean over space."""
    return classifier(maps.mean((2, 3)).to(next(classifier.parameters()).dtype))


def read_about(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `Deployable.save` was told about the module."""
    return _read(path)[1]["about"]


def load_deployable(
    path: str | os.PathLike[str],
    student: nn.Module,
    connectors: Sequence[nn.Module] = (),
) -> Deployable:
    """The module that `Deployable.save` wrote, in evaluation mode.

    Args:
        path: the file.
        student: a new model of the student's kind, as it was given to the method. It is copied.
        connectors: new connectors, where the method had some of the user's own.

    Raises:
        ValueError: no such file, a damaged one, or one of another student.
    """
    tensors, structure = _read(path)
    paths: list[tuple[nn.Module, nn.Linear]] = []
    own = list(connectors)
    for spec, (inputs, outputs, bias) in zip(structure["connectors"], structure["classifiers"]):
        kind = spec.pop("kind")
        if kind is None and not own:
            raise ValueError(f"{path} has a connector of the user's own: give a new one in connectors=")
        connector = own.pop(0) if kind is None else make_connector(kind, **spec)
        paths.append((connector, nn.Linear(inputs, outputs, bias=bias)))
    modules = dict(student.named_modules())
    for name in (structure["classifier"], structure["map"]):
        if paths and name is not None and name not in modules:
            raise ValueError(f"{path} is of another student: it has {name}")
    module = Deployable(student, paths, classifier=structure["classifier"], map=structure["map"])
    check_fit(module, tensors, f"{path} is of another student")
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        value.data = value.data.to(tensors[name].dtype)  # the file's precision, not the new student's
    module.load_state_dict(tensors)
    return module.eval()


def fit(module: nn.Module, tensors: Mapping[str, Tensor], complaint: str) -> None:
    """Load a state dict, or say in one line what does not fit; then nothing was loaded."""
    check_fit(module, tensors, complaint)
    module.load_state_dict(tensors)


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], complaint: str) -> None:
    """Say in one line what of a state dict does not fit a module."""
    have = module.state_dict()
    missing, more = sorted(have.keys() - tensors.keys()), sorted(tensors.keys() - have.keys())
    wrong = [name for name in have if name in tensors and have[name].shape != tensors[name].shape]
    if missing or more or wrong:
        what = (
            f"it lacks {missing[0]}"
            if missing
            else f"it has {more[0]}"
            if more
            else f"{wrong[0]} is {tuple(tensors[wrong[0]].shape)}, not {tuple(have[wrong[0]].shape)}"
        )
        raise ValueError(f"{complaint}: {what}")


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    safetensors = _safetensors("safetensors")
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise ValueError(f"{path} is not a deployable module of kdkernels")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(about["structure"])  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from None


def _safetensors(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError("shipped modules are safetensors files: pip install 'kdkernels[methods]'") from None
