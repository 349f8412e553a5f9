"""What a directory or a repository is that holds no safetensors model: said in a few words, with what would help."""

from __future__ import annotations

import re
from collections.abc import Collection
from posixpath import dirname

from kconvert.checkpoint.listing import CONFIG_NAME, INDEX_NAME, Listing, what_finishes
from kconvert.checkpoint.side_files import TRAINING, why_left_out
from kconvert.errors import KconvertError

ADAPTER_CONFIG = "adapter_config.json"
PIPELINE = "model_index.json"
ADAPTER_FILE = re.compile(r"adapter_model.*|adapters?[.]safetensors|pytorch_lora_weights[.]safetensors", re.DOTALL)
ADAPTER_TENSOR = re.compile(r"(^|[._])lora_(a|b|embedding_a|embedding_b|magnitude_vector)([._]|$)", re.IGNORECASE)
CONSOLIDATED = re.compile(r"consolidated[.-].*", re.DOTALL)
GIVE_SAFETENSORS = "give the directory of a safetensors checkpoint"
SAVE_AS_SAFETENSORS = "load the model with transformers and save it with save_pretrained, which writes safetensors"
OUTPUTS = (".gguf", ".kt")  # ends of files of what conversions make that is no safetensors model
SHOWN = 3  # folders that a message lists

# The end of a file's name -> what holds weights so, and what to do.
CONTAINERS = {
    ".gguf": ("GGUF files, which are not converted", GIVE_SAFETENSORS),
    ".bin": ("PyTorch's pickled files, which may run code and are not read", SAVE_AS_SAFETENSORS),
    ".pt": ("PyTorch's pickled files, which may run code and are not read", SAVE_AS_SAFETENSORS),
    ".pth": ("PyTorch's pickled files, which may run code and are not read", SAVE_AS_SAFETENSORS),
    ".ckpt": ("PyTorch's pickled files, which may run code and are not read", SAVE_AS_SAFETENSORS),
    ".npz": ("NumPy's archives, which are not read", "save the model as safetensors, or " + GIVE_SAFETENSORS),
    ".distcp": (
        "a training's distributed checkpoint, which is not read",
        "merge it into safetensors files, as `accelerate merge-weights` does",
    ),
    ".kt": (
        "AMX weights of KTransformers, which are all experts and no model",
        "give the checkpoint that they were packed of",
    ),
    ".nemo": ("NeMo's archives, which are not read", "export it to Hugging Face's layout with NeMo first"),
    ".onnx": ("ONNX files, which are not read", GIVE_SAFETENSORS),
    ".h5": ("TensorFlow's files, which are not read", GIVE_SAFETENSORS),
    ".msgpack": ("Flax's files, which are not read", GIVE_SAFETENSORS),
}


def is_adapter_file(file: str) -> bool:
    return ADAPTER_FILE.fullmatch(file) is not None


def is_consolidated(file: str) -> bool:
    """Whether this is a file of the layout in which Mistral and Meta publish a model beside the one of transformers."""
    return CONSOLIDATED.fullmatch(file) is not None


def check_no_adapter(listing: Listing, names: Collection[str]) -> None:
    """KconvertError when a model's tensors are those of an adapter, whatever the files are called."""
    found = (ADAPTER_TENSOR.search(name) is not None for name in names)
    if names and (any(found) if ADAPTER_CONFIG in listing.files else all(found)):
        raise KconvertError(f"{listing.root} {_adapter(listing)}")


def what_it_is(listing: Listing) -> str:
    """The rest of a sentence that begins with the directory, which holds no safetensors model."""
    tellers = (_unfinished, _adapter_files, _publishers_files, _pipeline, _folders, _other_containers)
    said = (teller(listing) for teller in tellers)
    return next(filter(None, said), f"holds no safetensors files; {GIVE_SAFETENSORS}")


def _unfinished(listing: Listing) -> str | None:
    help = None if any(file.endswith(OUTPUTS) for file in listing.files) else what_finishes(listing.root)
    return f"is unfinished, it has no weights yet; {help}" if help else None


def _adapter_files(listing: Listing) -> str | None:
    top = listing.top
    return _adapter(listing) if ADAPTER_CONFIG in top or any(map(is_adapter_file, top)) else None


def _adapter(listing: Listing) -> str:
    base = listing.json(ADAPTER_CONFIG).get("base_model_name_or_path") if ADAPTER_CONFIG in listing.files else None
    of = f" of {base!r}" if base and isinstance(base, str) else ""
    return (
        f"holds an adapter{of}, no model; merge it into its base (merge_and_unload() of PEFT, then save_pretrained) and give "
        "the result"
    )


def _publishers_files(listing: Listing) -> str | None:
    if not any(map(is_consolidated, listing.top)):
        return None
    return (
        "holds a model in its publisher's own layout (consolidated files), whose names are not read; give the directory of "
        "its transformers layout (config.json and model*.safetensors), or convert it with transformers' script"
    )


def _pipeline(listing: Listing) -> str | None:
    if PIPELINE not in listing.files:
        return None
    return f"is a diffusers pipeline ({PIPELINE}); give one of its folders, or the directory of a language model"


def _folders(listing: Listing) -> str | None:
    folders = sorted({dirname(file) for file in listing.safetensors} - {""})
    bare = " (which has no config.json)"
    shown = [folder + bare * (f"{folder}/{CONFIG_NAME}" not in listing.files) for folder in folders[:SHOWN]]
    if len(folders) == 1:
        return f"holds its checkpoint in the folder {shown[0]}; give that folder"
    more = f" and {len(folders) - SHOWN} more" if len(folders) > SHOWN else ""
    return f"holds checkpoints in its folders {', '.join(shown)}{more}; give one of them" if folders else None


def _other_containers(listing: Listing) -> str | None:
    for suffix, (what, advice) in CONTAINERS.items():
        for file in listing.files:
            if file.lower().endswith(suffix) and (suffix == ".distcp" or why_left_out(file) != TRAINING):
                return f"holds no safetensors files, but {what} ({file}); {advice}"
    if not listing.files:
        return "is empty, it holds no safetensors files; give the directory that holds the checkpoint's config.json"
    if {CONFIG_NAME, INDEX_NAME} & set(listing.top):
        return "holds no safetensors files, only what lies beside them; fetch them"
    return None
