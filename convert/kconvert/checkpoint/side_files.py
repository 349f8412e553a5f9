"""Which files beside the weights go along into a converted checkpoint, judged by their names.

What a tokenizer, a chat template, a licence or the model's code needs goes along. What does not: weights in other
containers, which are stale beside converted ones; declarations of a quantisation, because config.json alone declares what
an output has; the state of a training; and what downloads leave lying about.
"""

from __future__ import annotations

import re

WEIGHTS = "is not part of the checkpoint"
DECLARATION = "declares a quantisation, which the output's config.json alone does,"
TRAINING = "is of a training, not of the model,"
LEFTOVER = "is left over from a download or a program"

_CONTAINERS = (
    "safetensors|bin|pt|pt2|pth|pkl|pickle|ckpt|gguf|ggml|kt|h5|keras|msgpack|onnx|onnx_data|npz|npy|nemo|ot|pb|tflite|"
    "mlmodel|engine|pdparams|pdiparams|mnn|tar|tgz|tar[.]gz|zip|7z|parquet|arrow"
)
_FOLDERS = (
    "global_step[0-9]*|checkpoint-[0-9]+|iter_[0-9]+|pytorch_model_fsdp(_[0-9]+)?|optimizer(_[0-9]+)?|dist_ckpt|runs|wandb|"
    "tensorboard|lightning_logs|mlruns"
)
_TABLE = "(json|ya?ml|toml|csv|ini)"

# reason -> what the whole path of a file looks like, in small letters; the first that fits is given.
_PATTERNS = {
    LEFTOVER: re.compile(
        r".*[.](part|partial|incomplete|aria2|crdownload|download|tmp|temp|lock|sw[op]|pyc)|.*~", re.DOTALL
    ),
    TRAINING: re.compile(
        rf"(.*/)?(({_FOLDERS})/.*|[^/]*[.](distcp|wandb)|latest|latest_checkpointed_iteration[.]txt|zero_to_fp32[.]py"
        r"|(trainer_state|trainer_log|training_args)[^/]*|events[.]out[.]tfevents[^/]*"
        r"|(optimizer|scheduler|scaler|rng_state|random_states|sampler)[^/]*[.](pt|pth|bin|pkl|safetensors))",
        re.DOTALL,
    ),
    DECLARATION: re.compile(
        rf"(.*/)?([^/]*quant[^/]*[.]{_TABLE}|(recipe|qat_config|qconfig|kv_cache_scales)[^/]*[.]{_TABLE})", re.DOTALL
    ),
    WEIGHTS: re.compile(
        rf"(.*/)?([^/]*[.]({_CONTAINERS})|[^/]*[.]index([.][^/]*)?[.]json|[^/]*[.](ckpt|onnx)[._-][^/]*"
        r"|openvino_[^/]*|params[.]json|adapter_config[.]json)",
        re.DOTALL,
    ),
}


def why_left_out(name: str) -> str | None:
    """What is said of a file that does not go along; None for one that does."""
    return next((why for why, pattern in _PATTERNS.items() if pattern.fullmatch(name.lower())), None)


def is_stale(name: str) -> bool:
    """Whether a file of this name would be mistaken for a part of the checkpoint that replaces what it belongs to."""
    return why_left_out(name) in (WEIGHTS, DECLARATION)
