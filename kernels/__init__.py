"""Kernels: the rank-one edit (reference and dispatch) and flash attention."""
