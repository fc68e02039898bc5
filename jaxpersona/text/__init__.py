"""Conversations as text: chat templates, tokens and what each token is."""
