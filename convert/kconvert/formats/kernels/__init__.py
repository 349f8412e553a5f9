"""Numba kernels, a module a family: tight loops over caller-owned buffers, without the GIL, compiled once and cached.

Each equals its twin in `kconvert.formats.reference` bit for bit. Arrays are two-dimensional with one quantisation group a
row, because LLVM vectorises loops of that shape; inner loops count from the start of a slice, because an index that could be
negative is looked at for every element. bf16 travels as the upper half of an f32, in u16. The formats import
these modules when they first decode or encode, so that planning never waits for numba.
"""
