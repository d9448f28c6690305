"""Triton kernels and their launchers: tensors in, tensors out. Autograd and dispatch are in ``clara_fast.ops``."""
