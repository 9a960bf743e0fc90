"""What a method sees of a model without changing it: its logits, what goes into its classifier, its last map.

Two forward hooks do it. The classifier is the model's last `nn.Linear` unless it is named; the last map is the output
of the last module before it that is 4-dimensional, preferably one whose mean over space is what the classifier gets. A
look at two images, before the first call, tells which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Seen(NamedTuple):
    """What one forward pass of a model showed. One that a caller kept may have None for what the method's `uses` does
    not name."""

    logits: Tensor  # (M, N)
    features: Tensor  # (M, D): what the classifier got
    map: Tensor  # (M, C, H, W): the last map; of a model without maps its features, as (M, D, 1, 1)


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
        self.map_calls = 1  # how often a forward pass calls the map's module; the last call makes the map
        self.looked = False
        #: Whether the model's output is its classifier's, with nothing behind it. None: not looked yet.
        self.ends_in_classifier: bool | None = None
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
        if not self.looked:
            self.look(images)
        self._at_classifier.ask()
        self._at_map.ask()
        try:
            logits = self.model(images)
        finally:  # whatever happens, nothing is kept from one call to the next
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

    @torch.compiler.disable
    def look(self, images: Tensor) -> None:
        """Find the last map, and check that the classifier is what it was taken for: once, on two images, in evaluation
        mode, so that no dropout stands between a map and its mean."""
        maps: list[tuple[str, Tensor]] = []
        classified: list[tuple[Any, Any]] = []
        handles = [
            module.register_forward_hook(_record(name, maps, classified))
            for name, module in self.model.named_modules()
            if name and module is not self.classifier
        ]
        handles.append(
            self.classifier.register_forward_hook(lambda _, inputs, out: classified.append((inputs[0], out)))
        )
        training = [module for module in self.model.modules() if module.training]
        for module in training:  # the flag alone: more that a model's own eval() does could not be undone
            module.training = False
        try:
            with torch.no_grad():
                logits = self.model(images[:2])
        finally:
            for handle in handles:
                handle.remove()
            for module in training:
                module.training = True
        features: Any
        features, output = classified[-1] if classified else (None, None)
        if output is None or not isinstance(logits, Tensor) or logits.shape != output.shape:
            raise ValueError(
                f"{self.role}_classifier must name the nn.Linear whose output is the {self.role}'s: "
                f"{self.classifier_name!r} gives {'nothing' if output is None else _shape(output)}, the "
                f"{self.role} {_shape(logits)}"
            )
        if features.dim() != 2:
            raise ValueError(f"{self.role}'s classifier must take features (M, D), got {_shape(features)}")
        self.ends_in_classifier = logits is output or torch.equal(logits, output)
        if self.has_map is None:
            self.map_name = _last_map(maps, features)
            self.has_map = self.map_name is not None
            if self.map_name is not None:
                self.model.get_submodule(self.map_name).register_forward_hook(self._at_map)
        self.map_calls = sum(name == self.map_name for name, _ in maps)
        self.looked = True

    def classifier_as(self, x: Tensor) -> tuple[Tensor, Tensor | None]:  # (N, D), (N,)
        """The classifier's weight and bias in the dtype of what goes into it, unless autocast sees to that."""
        weight, bias = self.classifier.weight, self.classifier.bias
        if torch.is_autocast_enabled(x.device.type):
            return weight, bias
        return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)

    def found_map(self) -> str | None:
        """The last map's name, which is known once the model was looked at."""
        if self.has_map is None:
            raise RuntimeError(
                f"{self.role}'s last map is not known yet: call the method on images first, or give {self.role}_map"
            )
        return self.map_name

    def of_width(self, x: Tensor) -> Tensor:  # (M, C, H, W)
        """The map, if its channels are what the classifier takes."""
        if x.shape[1] != self.width:
            raise ValueError(
                f"{self.role}'s last map must have the {self.width} channels that its classifier takes, got "
                f"{tuple(x.shape)} from {self.map_name!r}: name another with {self.role}_map"
            )
        return x

    def check_end(self) -> None:
        """That the classifier alone makes the logits of the features, for a method that puts others into it."""
        if self.ends_in_classifier is False:
            raise ValueError(
                f"{self.role}'s output must be that of its classifier {self.classifier_name!r}, got one that is "
                "changed behind it"
            )


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
    """Of the maps in the order in which they were made: the last whose mean over space the features are, one that is
    spread over space before one of a single place; or else the last that has the features' width; or else the last."""
    backwards = sorted(reversed(maps), key=lambda named: named[1].shape[2:].numel() == 1)
    wide = [(name, x) for name, x in backwards if x.shape[:2] == features.shape]
    for name, x in wide:
        if torch.allclose(x.float().mean((2, 3)), features.float(), rtol=1e-2, atol=1e-3):
            return name
    return next((name for name, _ in (*wide, *backwards)), None)


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
