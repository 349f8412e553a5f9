"""The encodings in plain torch, a module a family: the readable specification, the kernels' oracle, and the CUDA path.

Every function takes and returns tensors on any device and states its roundings.
"""
