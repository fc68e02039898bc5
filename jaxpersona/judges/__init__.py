"""Judges, which score how fully a reply plays its role."""
