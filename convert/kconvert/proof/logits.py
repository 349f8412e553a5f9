"""Logits of two forms of a small model, compared: what an error in the weights does to the model.

transformers runs both on the same tokens, with the weights as compressed-tensors and torch decode them (see oracle), in the
model's dtype. Activations stay as they are: an engine that quantises them as well adds an error of its own.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kconvert.errors import KconvertError, human
from kconvert.formats.dense import Dense
from kconvert.formats.stacks import MxStack
from kconvert.models.model import Model, Weight
from kconvert.proof.parity.oracle import TORCH_DTYPES, independent_values

if TYPE_CHECKING:
    import torch

# A router's choice for a layer: the experts of each token, and their shares.
Routing = list[tuple["torch.Tensor", "torch.Tensor"]]

CHOICES = (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights"))

ROUTER_NOTE = (
    "A small error that changes the choice of a router changes the logits by as much as another expert does. In a model with "
    "random weights every choice is a close one, so such flips outweigh what the encoding does to the weights: compare the "
    "weights, or the logits with the source's routing."
)


@dataclass(frozen=True)
class Agreement:
    """Of logits with the source's, over all tokens: the largest difference, mean KL(source || output) in nats, and the share
    of tokens with the same most likely successor."""

    max_abs: float
    kl: float
    top1: float


@dataclass(frozen=True)
class LogitsReport:
    """`experts`: the mean share of routed experts that both forms choose, and `routed`: the agreement when the output is made
    to choose as the source does; None of models without routed experts."""

    tokens: int
    text: str
    free: Agreement
    experts: float | None
    routed: Agreement | None
    note: str = ROUTER_NOTE


def compare_logits(
    source: Model, output: Model, *, text: Path | None = None, tokens: int = 128, seed: int = 0
) -> LogitsReport:
    """Run both models on the first `tokens` tokens of the file `text`, or on random ones.

    KconvertError when transformers does not know the model, or the memory does not hold it.
    """
    ids = _tokens(source, text, tokens, seed)
    expected, routing = _run(source, ids)
    found, chosen = _run(output, ids)
    routed = agreement(expected, _run(output, ids, routing)[0]) if routing else None
    said = f"the first {len(ids)} tokens of {text}" if text else f"{len(ids)} random tokens (seed {seed})"
    return LogitsReport(len(ids), said, agreement(expected, found), overlap(routing, chosen), routed)


def agreement(expected: torch.Tensor, found: torch.Tensor) -> Agreement:
    """Of logits f32 [tokens, vocabulary]."""
    a, b = expected.log_softmax(-1), found.log_softmax(-1)
    same = expected.argmax(-1) == found.argmax(-1)
    return Agreement(
        max_abs=float((expected - found).abs().max()),
        kl=float((a.exp() * (a - b)).sum(-1).double().mean()),
        top1=float(same.double().mean()),
    )


def overlap(one: Routing, two: Routing) -> float | None:
    """The mean share of a token's experts [tokens, k] that are also among the other's."""
    shares = [
        float((a.unsqueeze(-1) == b.unsqueeze(-2)).any(-1).double().mean())
        for (a, _), (b, _) in zip(one, two, strict=True)
    ]
    return sum(shares) / len(shares) if shares else None


def _tokens(model: Model, text: Path | None, count: int, seed: int) -> torch.Tensor:
    import torch

    section = model.manifest.section(model.checkpoint.config)
    vocabulary = section.get("vocab_size")
    if type(vocabulary) is not int or vocabulary < 1:
        raise KconvertError(f"{model.checkpoint.root / 'config.json'}: it has no vocab_size")
    if text is None:
        return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.checkpoint.root, trust_remote_code=False, local_files_only=True)
        ids = tokenizer(text.read_text("utf-8"))["input_ids"][:count]
    except Exception as error:  # whatever a tokenizer's files may bring about
        raise KconvertError(
            f"{text} cannot be tokenised with the files of {model.checkpoint.root} ({_first_line(error)}); leave out --text"
        ) from None
    return torch.tensor(ids).clamp(max=vocabulary - 1)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def _run(model: Model, ids: torch.Tensor, routing: Routing | None = None) -> tuple[torch.Tensor, Routing]:
    """Logits f32 [tokens, vocabulary] and what the routers chose; with `routing` they are made to choose that."""
    import torch

    network = _load(model)
    chosen: Routing = []
    given = iter(routing or ())
    for experts, names in expert_modules(network):
        hook = functools.partial(_route, names=names, chosen=chosen, given=given)
        experts.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        logits = network(ids.unsqueeze(0), use_cache=False).logits[0].float()
    return logits, chosen


def _route(
    experts: Any, args: tuple[Any, ...], kwargs: Any, names: Sequence[str], chosen: Routing, given: Iterator[Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Note the routers' choice among the arguments of a layer's experts, and put the given one in its place."""
    arguments = dict(inspect.signature(experts.forward).bind(*args, **kwargs).arguments)
    own = arguments[names[0]], arguments[names[1]]
    chosen.append(own)
    arguments.update(zip(names, next(given, own), strict=True))
    return tuple(arguments.values()), {}


def expert_modules(network: Any) -> Iterator[tuple[Any, Sequence[str]]]:
    """The modules of transformers that hold a layer's routed experts, told by what they are called with: the names of the
    arguments for each token's experts and their shares."""
    for module in network.modules():
        names = tuple(inspect.signature(module.forward).parameters)[1:3]
        if names in CHOICES:
            yield module, names


def _load(model: Model) -> Any:
    """The model of transformers with this checkpoint's values; none of the checkpoint's own code is run."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    _check_memory(model)
    config = model.manifest.section(model.checkpoint.config).maps[0]  # the language model's alone
    name = architecture(config)
    network = getattr(transformers, name, None)
    if network is None or not hasattr(network, "config_class"):
        what = f"transformers has no {name} of its own" if name else "its config.json names no architecture"
        raise KconvertError(f"{model.checkpoint.root}: {what}, so no logits are compared")
    said = {key: value for key, value in config.items() if key not in ("model_type", "auto_map", "quantization_config")}
    try:
        loaded, report = network.from_pretrained(
            None,
            config=network.config_class.from_dict(said),
            state_dict=dict(_state(model)),
            dtype=torch.bfloat16,
            output_loading_info=True,
        )
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise KconvertError(f"{model.checkpoint.root}: transformers cannot load it: {_first_line(error)}") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise KconvertError(
            f"{model.checkpoint.root}: transformers finds no {missing[0]!r} ({len(missing)} such) in it"
        )
    return loaded.eval()


def architecture(config: Mapping[str, Any]) -> str:
    """The class of transformers that a config.json names, "" where it names none."""
    listed = config.get("architectures")
    return str(listed[0]) if isinstance(listed, list) and listed else ""


def _state(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight's values and every other tensor, by the name it has in the language model."""
    import torch

    prefix = model.manifest.prefix
    with model.checkpoint.reader() as reader:
        for weight in model.weights:
            yield _named(weight, independent_values(weight, reader, 0, weight.rows), prefix)
        for plain in model.plain:
            tensor = plain.tensor
            if tensor.name.startswith(prefix):
                data = bytearray(reader.read(tensor.file, tensor.start, tensor.nbytes))
                values = torch.frombuffer(data, dtype=getattr(torch, TORCH_DTYPES[tensor.dtype])).view(tensor.shape)
                yield tensor.name.removeprefix(prefix), values


def _named(weight: Weight, values: torch.Tensor, prefix: str) -> tuple[str, torch.Tensor]:
    """A weight as transformers has it in BF16: the stacks of formats.stacks under their own name, transposed."""
    name = weight.name.removeprefix(prefix)
    match weight.format:
        case MxStack(stack=stack):
            out = weight.rows // stack
        case Dense(transposed=int(rows)):
            out = rows
        case _:
            return f"{name}.weight", values
    return name, values.view(-1, out, weight.cols).swapaxes(1, 2)


def _check_memory(model: Model) -> None:
    """Twice the weights in BF16: as read, and in the model."""
    needed = 4 * model.parameters
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise KconvertError(
            f"{model.checkpoint.root} needs about {human(needed)} of memory for its logits, {human(free)} are free; cut a "
            "smaller one out of it with `kconvert sample --from`"
        )
