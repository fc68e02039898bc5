"""Checkpoint formats (Hugging Face, Orbax, GGUF), vector files and the model "mini"."""
