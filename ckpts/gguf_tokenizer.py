"""Tokenizers from the metadata of GGUF models, built with the tokenizers library.

The GGUF conversion in transformers is not used, because it imports PyTorch. Two types of
vocabularies are supported: "gpt2" (byte-level BPE with merges; `tokenizer.ggml.pre` selects the
regular expressions for pre-tokenization) and "llama" (SentencePiece BPE; missing merges are derived
from the token scores, or for Gemma from the token ids).
"""

from __future__ import annotations

import array
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpersona.errors import UserError
from jaxpersona.extras import require

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # values of tokenizer.ggml.token_type
_MAX_LENGTH = 1024  # maximum number of characters per token; `_derive_merges` is quadratic in it
_NAMED = {"bos_token": "bos_token_id", "eos_token": "eos_token_id",
          "unk_token": "unknown_token_id", "pad_token": "padding_token_id"}
_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# As in llama.cpp, tokens with these texts are stop tokens and control tokens even if the metadata
# do not declare them. Of llama.cpp's list, "</s>" and "<|call|>" are omitted: the first is also an
# HTML tag (in Gemma's vocabulary), and the second belongs to models that are not supported.
_STOP_TEXTS = frozenset({"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>",
                         "<|end_of_text|>", "<end_of_turn>", "<|return|>", "<EOT>", "_<EOT>",
                         "<end_of_utterance>"})
_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_DIGITS = (r"\p{N}", *_GPT2)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",)
# Pre-tokenizer regular expressions, keyed by the value of tokenizer.ggml.pre and applied in order,
# as in llama.cpp. The value "default" means that the tokenizer is unknown; `_byte_level` warns.
_SPLITS = {
    "default": _GPT2, "gpt-2": _GPT2, "phi-2": _GPT2, "olmo": _GPT2,
    "smollm": _DIGITS, "starcoder": _DIGITS, "refact": _DIGITS, "command-r": _DIGITS,
    "llama3": _LLAMA3, "llama-v3": _LLAMA3, "llama-bpe": _LLAMA3, "falcon3": _LLAMA3,
    "smaug-bpe": _LLAMA3, "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "megrez": _QWEN2,
    "tekken": _TEKKEN,
}
# values of tokenizer.ggml.pre for tokenizers that keep a word whole if it is in the vocabulary, and
# that prepend BOS by default
_WHOLE_WORDS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "tekken"})
_NFC = frozenset({"qwen2"})  # values for tokenizers whose released form normalizes texts to NFC


def build(fields: Mapping[str, Any]) -> Any:
    """Build a transformers tokenizer, including its chat template, from GGUF metadata.

    Args:
      fields: the GGUF metadata.

    Returns:
      The tokenizer, or None if the metadata contains no vocabulary.

    Raises:
      UserError: the metadata is malformed, the type or pre-tokenization of the vocabulary is not
        supported, or transformers is not installed.
    """
    tokens = fields.get("tokenizer.ggml.tokens")
    if tokens is None:
        return None
    if not isinstance(tokens, list) or max(map(len, tokens), default=0) > _MAX_LENGTH:
        raise UserError(f"tokenizer.ggml.tokens must contain strings of at most {_MAX_LENGTH} "
                        "characters")
    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"tokenizer.ggml.model is {kind!r:.80}; it must be gpt2 or llama")
    named = {name: _token(fields, key, tokens) for name, key in _NAMED.items()}
    gemma = str(fields.get("general.architecture")).startswith("gemma")
    if kind == "gpt2":
        backend = _byte_level(fields, tokens)
    else:
        backend = _sentencepiece(fields, tokens, gemma, named["unk_token"])
    _add_tokens(backend, fields, tokens)
    _add_ends(backend, fields, named, tokens)
    transformers = require("transformers", "the tokenizer of a GGUF file needs transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False,
        **{k: v for k, v in named.items() if v is not None})
    template = fields.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(f"tokenizer.chat_template is {template!r:.60}; it must be a string")
    tokenizer.chat_template = template
    return tokenizer


def stop_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the stop token ids in the metadata, then the other ids of tokens in `_STOP_TEXTS`.

    Raises:
      UserError: a stop token id in the metadata is not the id of a token.
    """
    tokens = fields.get("tokenizer.ggml.tokens") or []
    found = [fields[f"tokenizer.ggml.{key}"] for key in _STOP_KEYS
             if _token(fields, key, tokens) is not None]
    found += [i for i, text in enumerate(tokens) if text in _STOP_TEXTS]
    return tuple(dict.fromkeys(found))


def _token(fields: Mapping[str, Any], key: str, tokens: Sequence[str]) -> str | None:
    """Return the text of the token with the id in a metadata field; None without this field."""
    number = fields.get(f"tokenizer.ggml.{key}")
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < len(tokens):
        raise UserError(f"tokenizer.ggml.{key} is {reprlib.repr(number)}; it must be the id "
                        f"of one of the {len(tokens)} tokens")
    return tokens[number]


def _kinds(fields: Mapping[str, Any], tokens: Sequence[str]) -> list[int]:
    """Return each token's type, which is always "control" for the tokens in `_STOP_TEXTS`."""
    kinds = fields.get("tokenizer.ggml.token_type")
    if kinds is None:
        kinds = np.full(len(tokens), _NORMAL)
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
        raise UserError("tokenizer.ggml.token_type must contain one integer per token")
    return [_CONTROL if text in _STOP_TEXTS else kind
            for text, kind in zip(tokens, kinds.tolist(), strict=True)]


def _merges(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = fields.get("tokenizer.ggml.merges")
    split = [m.split(" ") for m in merges] if isinstance(merges, list) else []
    pairs = [(parts[0], parts[1]) for parts in split if len(parts) == 2]
    if merges is None or len(pairs) != len(split):
        raise UserError("tokenizer.ggml.merges must contain strings of two tokens separated by a "
                        "space")
    return pairs


def _byte_level(fields: Mapping[str, Any], tokens: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = fields.get("tokenizer.ggml.pre", "default")
    if name == "default":
        given = "'default'" if "tokenizer.ggml.pre" in fields else "missing"
        warnings.warn(f"tokenizer.ggml.pre of this GGUF file is {given}; texts are split as for "
                      "GPT-2, so their token ids may differ from those that the model was trained "
                      "with. Convert the model again with a current version of llama.cpp",
                      stacklevel=2)
    if name not in _SPLITS:
        raise UserError(f"tokenizer.ggml.pre is {name!r:.80}; it must be one of "
                        f"{', '.join(_SPLITS)}")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, _merges(fields),
                                   ignore_merges=name in _WHOLE_WORDS))
    if name in _NFC:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in _SPLITS[name]),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: Mapping[str, Any], tokens: list[str], gemma: bool,
                   unknown: str | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    if gemma:  # GGUF files store Gemma's whitespace tokens with spaces instead of ▁
        tokens = ["▁" * len(t) if " " in t and not t.strip() else t for t in tokens]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if "tokenizer.ggml.merges" in fields:
        merges = _merges(fields)
    else:
        scores = fields.get("tokenizer.ggml.scores")
        if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
            raise UserError("tokenizer.ggml.scores must contain one number per token")
        # Gemma's merges are ordered by token id, not by score
        merges = _derive_merges(vocabulary, range(0, -len(tokens), -1) if gemma
                                else scores.tolist())
    backend = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=True, byte_fallback=True,
                                   unk_token=unknown))
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    else:
        prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
        if prefix:
            warnings.warn("the tokenizer of this GGUF file adds a space before a text "
                          "(tokenizer.ggml.add_space_prefix), as in transformers only at its "
                          "start; llama.cpp also adds one after every special token, so token ids "
                          "of chat prompts may differ from those that the model was trained with. "
                          "The model's folder in the Hugging Face layout has the released "
                          "tokenizer", stacklevel=2)
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement="▁", prepend_scheme="first" if prefix else "never", split=False)
        if prefix:
            steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _derive_merges(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return every split of a token into two tokens, by descending score of the whole token.

    Splits of equal scores are ordered by descending length of the left token, then of the right.
    Large vocabularies have half a million splits, so they are collected as integers (16 bytes per
    split), and the result contains the strings of the vocabulary instead of copies.
    """
    tokens = list(vocabulary)
    place = {token: i for i, token in enumerate(tokens)}
    found = array.array("i")
    for token in tokens:
        for i in range(1, len(token)):
            if (left := place.get(token[:i])) is not None and (
                    right := place.get(token[i:])) is not None:
                found.extend((place[token], i, left, right))
    whole, cut, left, right = np.array(found, np.int32).reshape(-1, 4).T
    lengths = np.array([len(token) for token in tokens], np.int32)
    score = np.array([scores[index] for index in vocabulary.values()], np.float64)
    order = np.lexsort((cut - lengths[whole], -cut, -score[whole]))
    return [(tokens[left[i]], tokens[right[i]]) for i in order]


def _add_tokens(backend: Any, fields: Mapping[str, Any], tokens: list[str]) -> None:
    """Add the control and user-defined tokens, which are matched before pre-tokenization."""
    from tokenizers import AddedToken

    kinds = _kinds(fields, tokens)
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        chosen = [AddedToken(token, normalized=False, special=special)
                  for token, one in zip(tokens, kinds, strict=True)
                  if one == kind and token and backend.token_to_id(token) is not None]
        (backend.add_special_tokens if special else backend.add_tokens)(chosen)


def _add_ends(backend: Any, fields: Mapping[str, Any], named: Mapping[str, str | None],
              tokens: list[str]) -> None:
    """Configure whether the tokenizer adds BOS and EOS to a text, according to the metadata."""
    from tokenizers.processors import TemplateProcessing

    sentencepiece = fields["tokenizer.ggml.model"] == "llama"
    begins = fields.get("tokenizer.ggml.add_bos_token",
                        sentencepiece or fields.get("tokenizer.ggml.pre") in _WHOLE_WORDS)
    ends = fields.get("tokenizer.ggml.add_eos_token", False)
    first = named["bos_token"] if begins else None
    last = named["eos_token"] if ends else None
    if first is None and last is None:
        return
    single = [*([first] if first else []), "$A", *([last] if last else [])]
    pair = [*single, *([first] if first else []), "$B:1", *([last] if last else [])]
    backend.post_processor = TemplateProcessing(
        single=single, pair=pair,
        special_tokens=[(text, fields[f"tokenizer.ggml.{key}"]) for text, key in
                        ((first, "bos_token_id"), (last, "eos_token_id")) if text])
