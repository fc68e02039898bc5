"""Kernels: the rank-one edit and flash attention."""
