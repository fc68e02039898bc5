"""Kernels for rank-one edits of the residual stream and for attention."""
