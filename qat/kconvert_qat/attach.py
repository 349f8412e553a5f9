"""Attaching fake quantisation to a model's routed experts, and taking it off again.

The class of each module with expert weights is swapped for a subclass whose forward sees fake-quantised weights. Parameters
stay where they are: keys, optimisers, save_pretrained, FSDP2, PEFT and deepcopy work as before. (parametrize was measured
to rename the keys and to lose LoRA silently.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, wraps
from threading import get_ident
from typing import Any, SupportsIndex

import torch
from torch import nn

from kconvert.errors import KconvertError
from kconvert_qat.config import QATConfig
from kconvert_qat.experts import ExpertWeight, find_experts
from kconvert_qat.grids.kept import Kept
from kconvert_qat.grids.serving import Place, State
from kconvert_qat.names import Matrix, matrices_of, select

STATE = "_kconvert_qat"
ORIGINAL = "_kconvert_original"


@dataclass
class Attached:
    """What a prepared module knows: where the parameters lie that it sees fake-quantised, what they were served as last, for
    each the Linear whose weight must be quantised by the same number, where there is one, and in which threads it works."""

    state: State
    places: dict[str, Place]
    kept: dict[str, Kept]
    mates: dict[str, nn.Module]
    at_work: set[int] = field(default_factory=set)

    def served(self, module: nn.Module) -> Served:
        return Served(module, {parameter: self.serve(module, parameter) for parameter in self.places})

    def serve(self, module: nn.Module, parameter: str) -> torch.Tensor:
        lists = getattr(module, "parametrizations", None)
        if self.state.config.lora == "merged" or lists is None or parameter not in lists:
            weight = getattr(module, parameter, None)
            self.places[parameter].check(weight, self.state.config)
            return self.quantised(weight, parameter)
        value = self.quantised(lists[parameter].original, parameter)
        for adapter in lists[parameter]:
            value = adapter(value)
        return value

    def quantised(self, weight: Any, parameter: str) -> torch.Tensor:
        if hasattr(weight, "to_local"):  # a DTensor: whole matrices on each rank
            served: torch.Tensor = type(weight).from_local(
                self.quantised(weight.to_local(), parameter),
                weight.device_mesh,
                weight.placements,
                run_check=False,
                shape=weight.shape,
                stride=weight.stride(),
            )
            return served
        mate: Any = self.mates.get(parameter)
        mated = None if mate is None else mate.weight.detach()
        return self.state.serve(weight, self.places[parameter], self.kept[parameter], mated)

    def end_forward(self) -> None:
        """Of the module, whether or not it came to its end."""
        if not torch.compiler.is_compiling():
            for kept in self.kept.values():
                kept.end_forward()


class Served:
    """A prepared module as its own forward sees it: with other weights."""

    def __init__(self, module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        self._module = module
        self._weights = weights

    def __getattr__(self, name: str) -> Any:
        return self._weights[name] if name in self._weights else getattr(self._module, name)


@dataclass(frozen=True)
class Coverage:
    """What is fake-quantised: the weights, and the matrices in them under their names in the checkpoint."""

    config: QATConfig
    weights: tuple[ExpertWeight, ...]
    matrices: tuple[Matrix, ...]

    @property
    def parameters(self) -> int:
        return sum(weight.tensor.numel() for weight in self.weights)

    def __str__(self) -> str:
        modules = len({id(weight.module) for weight in self.weights})
        return (
            f"{len(self.matrices):,} expert matrices with {self.parameters:,} parameters in {modules:,} modules, "
            f"{self.config.label}"
        )


def prepare(model: nn.Module, config: QATConfig | None = None) -> Coverage:
    """Let the routed experts of `model` see fake-quantised weights in their forward, and nothing else.

    Raises KconvertError, and changes nothing, when there are no experts, when not all that the model has are covered, or
    when one cannot be. With `lora="merged"` and experts in nn.Linear, PEFT comes first.
    """
    check_model(model)
    config = QATConfig() if config is None else config
    if not isinstance(config, QATConfig):
        raise KconvertError(f"prepare takes a QATConfig, and {config!r} is none")
    if any(attached_to(module) for module in model.modules()):
        raise KconvertError("the model is prepared already; call detach first to change the configuration")
    found = find_experts(model)
    matrices = matrices_of(model, found)
    weights = select(found, matrices, config)
    mates = _mates(weights, config)
    adapted = {id(layer.get_base_layer()): layer for layer in _adapted_linears(model)}
    if config.lora == "merged" and any(id(mate) in adapted for mate in mates.values()):
        raise KconvertError(
            f"{config.grid} has one number for gate and up, whose sums with adapters are in Linears apart; use lora='unmerged'"
        )
    for weight in weights:
        Place.of(weight, config).check(weight.tensor, config)
    state = State(config, active=config.start_step == 0)
    for weight in weights:
        _attach(_fake_quantised, weight.module, weight, state)
        if (mate := mates.get(weight.key)) is not None:
            vars(weight.module)[STATE].mates[weight.parameter] = mate
        if config.lora == "merged" and (layer := adapted.get(id(weight.module))) is not None:
            _attach(_fake_quantised_sum, layer, weight, state)
    return coverage(model)


def coverage(model: nn.Module) -> Coverage:
    """What `prepare` covered, read from the modules themselves; KconvertError when it is nothing or no longer all."""
    check_model(model)
    held = next((attached for module in model.modules() if (attached := attached_to(module))), None)
    if held is None:
        raise KconvertError("the model is not prepared for quantisation-aware training; call prepare first")
    config = held.state.config
    found = find_experts(model)
    for weight in found:
        if (place := _place_of(weight)) is not None:
            place.check(weight.tensor, config)
    matrices = matrices_of(model, found)
    weights = select(found, matrices, config)
    for weight in weights:
        if _place_of(weight) is None:
            raise KconvertError(f"{weight.key} is not fake-quantised; was its module replaced after prepare?")
    covered = {id(weight.module) for weight in weights}
    for layer in _adapted_linears(model):
        if config.lora == "merged" and id(layer.get_base_layer()) in covered and attached_to(layer) is None:
            raise KconvertError(
                "an adapter was added to an expert's Linear after prepare; with lora='merged' add it before"
            )
    chosen = {id(weight) for weight in weights}
    return Coverage(config, tuple(weights), tuple(matrix for matrix in matrices if id(matrix.weight) in chosen))


def detach(model: nn.Module) -> None:
    """Undo `prepare`; the weights are as training left them."""
    check_model(model)
    modules = [module for module in model.modules() if attached_to(module)]
    for module in modules:
        if ORIGINAL not in vars(type(module)) or _is_wrapped(module):
            raise KconvertError(f"{type(module).__name__} was wrapped after prepare; undo that before detach")
    for module in modules:
        if "forward" in vars(type(module)):
            vars(module).pop("forward", None)  # its own, put back by who had wrapped it
        module.__class__ = getattr(type(module), ORIGINAL)
        delattr(module, STATE)


def _is_wrapped(module: nn.Module) -> bool:
    """Whether somebody holds the forward that `prepare` gave it."""
    ours, own = vars(type(module)).get("forward"), vars(module).get("forward")
    return own is not None and ours is not None and getattr(own, "__func__", None) is not ours


def at_step(model: nn.Module, step: int) -> bool:
    """To be called before each step of a training loop: fake quantisation is active from `start_step` on."""
    check_model(model)
    if isinstance(step, bool) or not isinstance(step, SupportsIndex) or int(step) < 0:
        raise KconvertError(f"the step is {step!r}, but it must be a number of steps done")
    active = False
    for module in model.modules():
        if (attached := attached_to(module)) is not None:
            active = attached.state.active = step >= attached.state.config.start_step
            attached.state.step = step
    return active


def check_model(model: object) -> None:
    """KconvertError for anything but one of torch."""
    if not isinstance(model, nn.Module):
        raise KconvertError(f"a model is a torch.nn.Module, and this is {type(model).__name__}")


def attached_to(module: nn.Module) -> Attached | None:
    """What `prepare` left at the module."""
    attached: Attached | None = module.__dict__.get(STATE)
    return attached


def _place_of(weight: ExpertWeight) -> Place | None:
    """Of one that `prepare` covered."""
    attached = attached_to(weight.module)
    return attached.places.get(weight.parameter) if attached else None


def adapters_of(model: nn.Module) -> list[Any]:
    """PEFT's layers, each around a module of the model."""
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "get_base_layer")]


def _adapted_linears(model: nn.Module) -> list[Any]:
    return [layer for layer in adapters_of(model) if isinstance(layer.get_base_layer(), nn.Linear)]


def _mates(weights: list[ExpertWeight], config: QATConfig) -> dict[str, nn.Module]:
    """Of gate and up in Linears of their own, by their keys, the other's module, where they share a number."""
    pairs: dict[str, list[ExpertWeight]] = {}
    for weight in weights if config.spec.fuses else ():
        if not weight.stacked and weight.pieces[0] in ("gate", "up"):
            pairs.setdefault(weight.path.rpartition(".")[0], []).append(weight)
    both = [pair for pair in pairs.values() if len(pair) == 2]
    return {one.key: other.module for pair in both for one, other in (pair, pair[::-1])}


def _attach(swapped: Callable[[type], type], module: nn.Module, weight: ExpertWeight, state: State) -> None:
    attached = attached_to(module)
    if attached is None:
        attached = Attached(state, {}, {}, {})
        module.__dict__[STATE] = attached
        module.__class__ = (_served_within if "forward" in vars(module) else swapped)(type(module))
    attached.places[weight.parameter] = Place.of(weight, state.config)
    attached.kept[weight.parameter] = Kept(state.config.keep)


@cache
def _fake_quantised(original: Any) -> type:
    """The subclass whose forward is the original's on fake-quantised weights."""

    @wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        attached = self._kconvert_qat
        if not attached.state.active:
            return original.forward(self, *args, **kwargs)
        try:
            return original.forward(attached.served(self), *args, **kwargs)
        finally:
            attached.end_forward()

    return type(f"FakeQuantised{original.__name__}", (original,), {"forward": forward, ORIGINAL: original})


@cache
def _served_within(original: Any) -> type:
    """The subclass of a module whose forward others have wrapped and hold (accelerate's hooks of a device_map, transformers'
    expert parallelism): as long as it is called, its weights are the fake-quantised ones."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        attached = self._kconvert_qat
        if attached.places.keys() & getattr(self, "parametrizations", {}).keys():
            raise KconvertError(
                f"{original.__name__} has adapters on experts whose forward is wrapped (a device_map over several devices, or "
                "expert parallelism), where their sum is not seen; train the weights themselves"
            )
        thread = get_ident()
        if not attached.state.active or thread in attached.at_work:
            return original.__call__(self, *args, **kwargs)
        attached.at_work.add(thread)
        try:
            return original.__call__(self, *args, **kwargs)
        finally:
            attached.at_work.discard(thread)
            attached.end_forward()

    def look_up(self: Any, name: str) -> Any:
        value = original.__getattr__(self, name)
        attached = attached_to(self)
        if attached is None or name not in attached.places or get_ident() not in attached.at_work:
            return value
        return attached.quantised(value, name)

    members = {"__call__": call, "__getattr__": look_up, ORIGINAL: original}
    return type(f"FakeQuantised{original.__name__}", (original,), members)


@cache
def _fake_quantised_sum(original: Any) -> type:
    """The same of PEFT's layer around an nn.Linear, which quantises the sum of the weight and its adapters."""

    @wraps(original.forward)
    def forward(self: Any, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        attached = self._kconvert_qat
        if not attached.state.active or self.disable_adapters or self.merged:
            return original.forward(self, inputs, *args, **kwargs)
        linear = self.get_base_layer()
        weight = linear.weight
        for adapter in self.active_adapters:
            weight = weight + self.get_delta_weight(adapter)
        try:
            return nn.functional.linear(inputs, attached.quantised(weight, "weight"), linear.bias)
        finally:
            attached.end_forward()

    return type(f"FakeQuantised{original.__name__}", (original,), {"forward": forward, ORIGINAL: original})
