"""Persona analysis: role vectors, the Assistant Axis, its self-test, projections and drift."""
