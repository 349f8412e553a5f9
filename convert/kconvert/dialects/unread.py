"""Quantisations that are met and not read, so that a refusal says what a file is.

A dialect that comes to be read is taken out here and put into dialects.registry.
"""

from __future__ import annotations

from dataclasses import dataclass

from kconvert.dialects.fields import Table, brief

ORIGINAL = "convert the checkpoint that it was made from"
BITS = ("bits", "group_size")


@dataclass(frozen=True, slots=True)
class Unread:
    """`methods` are its names in quant_method; `signs` are keys that give it away where there is no quant_method.

    `shows` are the keys whose values tell one such checkpoint from the other; `helps` is what one can do.
    """

    what: str
    methods: tuple[str, ...]
    signs: tuple[str, ...] = ()
    shows: tuple[str, ...] = BITS
    helps: str = ORIGINAL

    def describe(self, table: Table) -> str:
        """What it is and by which of its values one knows it."""
        found = [(key, table.values.get(key)) for key in ("quant_method", *self.shows)]
        shown = ", ".join(f"{key} {brief(value)}" for key, value in found if isinstance(value, str | int | float))
        return f"{self.what} ({shown})" if shown else self.what


UNREAD = (
    Unread("Marlin's", ("marlin",)),
    Unread(
        "gpt-oss's MXFP4, in stacks of experts",
        ("mxfp4",),
        (),
        (),
        "it is read where config.json has the model_type gpt_oss, for other models convert the BF16 checkpoint",
    ),
    Unread(
        "bitsandbytes'",
        ("bitsandbytes",),
        ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_quant_type"),
        ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type"),
        f"load it with transformers and save what `model.dequantize()` gives, or {ORIGINAL}",
    ),
    Unread("torchao's", ("torchao",), ("quant_type",), ()),
    Unread("HQQ", ("hqq",), ("weight_quant_params",), ()),
    Unread("EETQ's INT8", ("eetq",), (), ("weights",)),
    Unread("AQLM", ("aqlm",), ("num_codebooks",), ("num_codebooks", "nbits_per_codebook")),
    Unread("quanto's", ("quanto",), (), ("weights",)),
    Unread("FBGEMM's FP8", ("fbgemm_fp8",), ("activation_scale_ub",), ("activation_scale_ub",)),
    Unread("HIGGS", ("higgs",), ("hadamard_size",)),
    Unread("SpQR", ("spqr",), ("beta1",)),
    Unread("VPTQ", ("vptq",), ("config_for_layers",), ()),
    Unread("BitNet's", ("bitnet",), ("linear_class",), ("quantization_mode",)),
    Unread("FP-Quant's", ("fp_quant",), ("forward_dtype",), ("forward_dtype",)),
    Unread("ExLlama's", ("exl2", "exl3"), ("head_bits",), ("bits", "head_bits")),
    Unread("GGUF", ("gguf",), (), ()),
)


def unread(table: Table) -> Unread | None:
    """What the table declares, if it is one of those."""
    method = table.values.get("quant_method")
    if isinstance(method, str):
        return next((one for one in UNREAD if method.lower() in one.methods), None)
    return next((one for one in UNREAD if method is None and any(sign in table for sign in one.signs)), None)
