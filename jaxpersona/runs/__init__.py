"""Rollouts, and the run folder with the files, the manifest and the lock of a run."""
