"""Captures: reductions of activations, computed inside the compiled program."""
