"""Inference on conversations: sampling, compiled programs, generation and extraction."""
