"""Runs: rollouts, and the run folder with its files, manifest and lock."""
