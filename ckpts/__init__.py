"""Checkpoint formats (Hugging Face, Orbax, GGUF), vector files and the embedded model."""
