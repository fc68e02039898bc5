"""Judges: score how fully a rollout plays its role."""
