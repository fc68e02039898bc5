"""Chat templates, tokenization and the kinds of tokens."""
