"""Weights compared by ways of their own: compressed-tensors, torch, the references; never the kernels that wrote them."""
