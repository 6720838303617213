"""Liger 0.8.5: a stand-in, whose kernels want Triton and a GPU."""
