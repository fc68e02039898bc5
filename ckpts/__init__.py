"""Checkpoints and vectors: Hugging Face folders, Orbax, vector files and the embedded model."""
