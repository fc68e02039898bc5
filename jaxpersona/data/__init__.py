"""Prompt data of this project: roles, questions, traits, drift conversations (DATA_CARD.md)."""
