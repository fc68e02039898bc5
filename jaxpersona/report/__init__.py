"""Figures of a run, as PNG files."""
