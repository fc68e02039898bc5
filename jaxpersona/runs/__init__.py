"""Rollouts, and run folders: their files, manifests and locks."""
