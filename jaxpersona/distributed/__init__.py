"""Meshes and processes."""
