"""Read and hold a language model's persona: a JAX engine whose activations are open to data."""
