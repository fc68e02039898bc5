"""Roles, questions, traits and drift conversations, written for this project (DATA_CARD.md)."""
