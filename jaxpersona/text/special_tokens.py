"""The special tokens of a tokenizer."""

from __future__ import annotations

from typing import Any


def special_ids(tokenizer: Any, *, added: bool = False) -> set[int]:
    """Return the ids of the tokens that `tokenizer.decode(…, skip_special_tokens=True)` omits.

    These are the tokens with a role, such as EOS (`all_special_ids`), and all added tokens that are
    marked as special.

    Args:
      tokenizer: a transformers tokenizer.
      added: whether to include the other added tokens, which `decode` does not omit.
    """
    tokens = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids,
            *(number for number, token in tokens.items() if added or token.special)}
