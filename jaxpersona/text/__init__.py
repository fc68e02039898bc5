"""Chat templates, tokenization and token labels."""
