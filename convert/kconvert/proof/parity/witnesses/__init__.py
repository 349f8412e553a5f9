"""Somebody else's word on each encoding, one module a family: how its values, bytes and codes are known without the kernels."""
