"""Runs: rollouts and the run folder, which contains a run's files, manifest and lock."""
