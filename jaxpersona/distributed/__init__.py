"""Distributed execution: meshes, shardings and processes."""
