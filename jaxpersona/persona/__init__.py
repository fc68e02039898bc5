"""Persona analysis: role vectors, the Assistant Axis, the self-test, projections and drift."""
