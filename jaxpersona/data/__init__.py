"""Prompt data: roles, questions, traits and drift conversations (see DATA_CARD.md)."""
