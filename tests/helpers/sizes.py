"""What small models in tests measure, by the manifests' symbols."""

SIZES = {
    "layers": 3,
    "dense_layers": 1,
    "experts": 4,
    "hidden": 256,
    "intermediate": 512,
    "moe_intermediate": 128,
    "vocab": 512,
    "heads": 4,
    "q_rank": 64,
    "kv_rank": 32,
}
