"""The ways of saying in a config.json how weights are quantised: one module a dialect, read and written."""

from kconvert.dialects.base import QuantizationConfig
from kconvert.dialects.registry import DECLARING_FILES, declared_beside, files_beside, read_quantization
from kconvert.dialects.tables import KEYS, declare_dtype, quantization_tables, with_quantization, without_quantization

__all__ = [
    "DECLARING_FILES",
    "KEYS",
    "QuantizationConfig",
    "declare_dtype",
    "declared_beside",
    "files_beside",
    "quantization_tables",
    "read_quantization",
    "with_quantization",
    "without_quantization",
]
