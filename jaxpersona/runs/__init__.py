"""A run's folder on disk: its files, their digests and its lock."""
