"""Vectors: named directions of the residual stream, axes and caps."""
