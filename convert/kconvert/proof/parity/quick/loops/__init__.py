"""What `native` makes machine code of: loops over the elements of a weight, written anew for the proof.

They share nothing with the kernels that convert: other formulas where there are others, the reference's order of operations
everywhere. Arrays are pointers, so that no index is looked at twice; who calls knows that they are long enough. Every loop
returns a number, by convention how much is wrong.
"""
