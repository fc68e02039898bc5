"""Judges score role play."""
