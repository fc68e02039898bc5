"""Prompt data: roles, questions, traits and openings of drift conversations (see DATA_CARD.md)."""
