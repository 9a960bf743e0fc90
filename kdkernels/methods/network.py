"""What a method sees of a model without changing it: its logits, what goes into its classifier, its last map.

Two forward hooks do it. The classifier is the model's last `nn.Linear` unless it is named; the last map is the output
of the last module before it that is 4-dimensional, preferably one whose mean over space is what the classifier gets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Seen(NamedTuple):
    """What one forward pass of a model showed."""

    logits: Tensor  # (M, N)
    features: Tensor  # (M, D): what the classifier got
    map: Tensor  # (M, C, H, W): the last map; of a model without maps its features, as (M, D, 1, 1)

    def detached(self) -> Seen:
        return Seen(*(x.detach() for x in self))

    def of(self, dtype: torch.dtype) -> Seen:
        return Seen(*(x.to(dtype) for x in self))


class Keep:
    """A forward hook that, while it is asked to, keeps what its module got and gave."""

    def __init__(self) -> None:
        self.asked = False
        self.kept: list[tuple[Any, Any]] = []

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self.asked:
            self.kept.append((inputs[0] if inputs else None, output))

    def ask(self) -> None:
        self.kept.clear()
        self.asked = True

    def take(self) -> tuple[Any, Any] | None:
        """The last that was kept; nothing is kept any longer."""
        self.asked = False
        last = self.kept[-1] if self.kept else None
        self.kept.clear()
        return last


def find_classifier(model: nn.Module, role: str, name: str | None = None) -> tuple[str, nn.Linear]:
    """The model's classifier and its name: the one that is named, or else its last `nn.Linear`."""
    modules = dict(model.named_modules())
    linear = [n for n, module in modules.items() if isinstance(module, nn.Linear)]
    if name is None:
        if not linear:
            raise ValueError(
                f"{role} must have an nn.Linear as its classifier, got {type(model).__name__} without one"
            )
        name = linear[-1]
    module = modules.get(name)
    if not isinstance(module, nn.Linear):
        got = "no such module" if module is None else type(module).__name__
        raise ValueError(f"{role}_classifier must name an nn.Linear of the {role}, got {name!r}: {got}")
    return name, module


def check_map(model: nn.Module, role: str, name: str | None) -> str | None:
    if name is not None and name not in dict(model.named_modules()):
        raise ValueError(f"{role}_map must name a module of the {role}, got {name!r}: no such module")
    return name


class Network:
    """A model, its classifier and its last map. Calling it runs the model and gives what was `Seen`."""

    def __init__(
        self, model: nn.Module, role: str, classifier: str | None = None, map: str | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{role} must be an nn.Module, got {type(model).__name__}")
        self.model, self.role = model, role
        self.classifier_name, self.classifier = find_classifier(model, role, classifier)
        self.map_name = check_map(model, role, map)
        self.has_map: bool | None = None if map is None else True  # None: not looked for yet
        self._at_classifier, self._at_map = Keep(), Keep()
        self.classifier.register_forward_hook(self._at_classifier)
        if self.map_name is not None:
            model.get_submodule(self.map_name).register_forward_hook(self._at_map)

    @property
    def width(self) -> int:
        """How many features its classifier takes."""
        return self.classifier.in_features

    @property
    def classes(self) -> int:
        return self.classifier.out_features

    def __call__(self, images: Tensor) -> Seen:
        return self._look(images) if self.has_map is None else self._run(images)

    def _run(self, images: Tensor) -> Seen:
        self._at_classifier.ask()
        self._at_map.ask()
        logits = self.model(images)
        at_classifier, at_map = self._at_classifier.take(), self._at_map.take()
        if at_classifier is None:
            raise ValueError(
                f"{self.role}_classifier {self.classifier_name!r} is not used by the {self.role}"
            )
        features = at_classifier[0]
        if not self.has_map:
            return Seen(logits, features, features[:, :, None, None])
        if at_map is None or not isinstance(at_map[1], Tensor) or at_map[1].dim() != 4:
            got = "nothing" if at_map is None else _shape(at_map[1])
            raise ValueError(f"{self.role}_map {self.map_name!r} must give (M, C, H, W), got {got}")
        return Seen(logits, features, at_map[1])

    def _look(self, images: Tensor) -> Seen:
        """The first pass: finds the last map, and that the classifier is what it was taken for."""
        maps: list[tuple[str, Tensor]] = []
        classified: list[Any] = []
        handles = []
        for name, module in self.model.named_modules():
            if name and module is not self.classifier:
                handles.append(module.register_forward_hook(_record(name, maps, classified)))
        handles.append(self.classifier.register_forward_hook(lambda _, __, output: classified.append(output)))
        self._at_classifier.ask()
        try:
            logits = self.model(images)
        finally:
            for handle in handles:
                handle.remove()
        at_classifier = self._at_classifier.take()
        if at_classifier is None or not isinstance(logits, Tensor) or logits.shape != classified[-1].shape:
            raise ValueError(
                f"{self.role}_classifier must name the nn.Linear whose output is the {self.role}'s: "
                f"{self.classifier_name!r} gives {_shape(classified[-1]) if classified else 'nothing'}, the "
                f"{self.role} {_shape(logits)}"
            )
        features = at_classifier[0]
        if features.dim() != 2:
            raise ValueError(f"{self.role}'s classifier must take features (M, D), got {_shape(features)}")
        self.map_name = _last_map(maps, features)
        self.has_map = self.map_name is not None
        if self.map_name is None:
            return Seen(logits, features, features[:, :, None, None])
        self.model.get_submodule(self.map_name).register_forward_hook(self._at_map)
        return Seen(logits, features, next(x for name, x in reversed(maps) if name == self.map_name))


def without_hooks(model: nn.Module) -> nn.Module:
    """The model, after taking off the hooks of a `Network` (of a copy, whose own hooks came with it)."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, Keep):
                del module._forward_hooks[key]
    return model


def _record(
    name: str, maps: list[tuple[str, Tensor]], classified: list[Any]
) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and not classified:
            maps.append((name, output))

    return hook


def _last_map(maps: list[tuple[str, Tensor]], features: Tensor) -> str | None:
    spread = [(name, x) for name, x in maps if x.shape[2] * x.shape[3] > 1]
    for name, x in reversed(spread):
        if x.shape[:2] == features.shape:
            with torch.no_grad():
                mean = x.float().mean((2, 3))
                if torch.allclose(mean, features.float(), rtol=1e-2, atol=1e-3):
                    return name
    if spread:
        return spread[-1][0]
    return maps[-1][0] if maps else None


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
