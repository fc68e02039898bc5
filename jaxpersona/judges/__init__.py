"""Judges, which score replies, for example by how fully a reply plays its role."""
