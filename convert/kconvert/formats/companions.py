"""The names of what lies beside a weight and does not enter its values: how activations, outputs and the cache are scaled.

Nobody looks into such tensors, whatever they hold: an expert that no token reached has Inf there. They stay with a weight that
is copied as it is, for the engine that serves its codes, and are left behind where it is decoded.
"""

from __future__ import annotations

FACTS = ("scale", "scales", "scale_inv", "scale_ub", "global_scale", "zero_point", "amax")
# Of what goes into a Linear and comes out of it.
ACTIVATIONS = frozenset(
    f"{side}_{fact}" for side in ("input", "output", "activation", "input_activation", "act") for fact in FACTS
)
# Of keys, values and queries, and of what attention makes of them.
CACHE = frozenset(f"{side}_{fact}" for side in ("q", "k", "v", "kv", "prob") for fact in FACTS)
COMPANIONS = ACTIVATIONS | CACHE
