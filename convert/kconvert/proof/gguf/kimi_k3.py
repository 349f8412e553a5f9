"""What llama.cpp has of Kimi-K3 that is computed of several of the source's tensors, or of a part of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kconvert.formats.dense import Dense
from kconvert.formats.engines.kimi import Product
from kconvert.models.model import Model, Weight
from kconvert.models.sorting import Plain
from kconvert.proof.parity.witnesses.kimi import Exponents

NORM, PROJECTION, DECAY = "_res_norm.weight", "_res_proj.weight", ".A_log"


def fused(items: Iterable[Weight | Plain], model: Model) -> Iterator[Weight | Plain]:
    """The items, but norms of residuals with their projections as one weight, called as the norm, and decays of the model's
    heads alone."""
    held = list(items)
    projections = {item.name: item for item in held if isinstance(item, Weight) and item.name.endswith(PROJECTION)}
    norms = {item.name for item in held if isinstance(item, Weight) and item.name.endswith(NORM)}
    heads = model.manifest.section(model.checkpoint.config).get("num_attention_heads")
    for item in held:
        if not isinstance(item, Weight) or not isinstance(item.format, Dense):
            yield item
        elif item.name in norms and (other := projections.get(item.name.replace(NORM, PROJECTION))):
            tensors = item.tensors[0], other.tensors[0]
            format = Product((tensors[0].dtype, tensors[1].dtype))
            yield Weight(item.name, item.role, 1, item.cols, format, tensors, item.layer)
        elif item.name.endswith(DECAY) and isinstance(heads, int) and 0 < heads <= item.cols and item.rows == 1:
            yield Weight(item.name, item.role, 1, heads, Exponents(item.cols), item.tensors, item.layer)
        elif item.name not in projections or item.name.replace(PROJECTION, NORM) not in norms:
            yield item
