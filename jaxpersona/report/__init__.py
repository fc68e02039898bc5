"""Plots of a run, as PNG files."""
