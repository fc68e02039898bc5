"""The run folder: rollouts, its files, their digests, its manifest and its lock."""
