"""Quantisation-aware training of MoE experts on the exact grid that is shipped, and its export bit for bit."""

from kconvert_qat.attach import Coverage, at_step, coverage, detach, prepare
from kconvert_qat.config import QATConfig
from kconvert_qat.export import export
from kconvert_qat.load import load

__all__ = ["Coverage", "QATConfig", "at_step", "coverage", "detach", "export", "load", "prepare"]
