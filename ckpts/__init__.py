"""Files: Hugging Face folders, Orbax checkpoints, vectors, and the embedded model."""
