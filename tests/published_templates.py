"""Published chat templates, small tokenizers for them, and readable spans.

`published/<name>.jinja` renders text conversations like the published template. The templates were
written from memory; branches for tools raise an error, and long lines are broken inside tags, where
whitespace has no effect.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

import jaxpersona as jp
from jaxpersona.models.batch import ASSISTANT, CODE, GENERATED, SYSTEM, TEMPLATE, THINKING, USER

FOLDER = pathlib.Path(__file__).parent / "text" / "published"
LETTERS = {TEMPLATE: "t", SYSTEM: "s", USER: "u", ASSISTANT: "a", GENERATED: "g", THINKING: "h",
           CODE: "c"}
WORDS = ["You are a pirate.\n\nWho are you?\n\n", "user\nassistant\nsystem\nmodel\n\n\n",
         "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
         "I am a helpful pirate.\n", "Why the sea the ship the sea  the ship:\n\n",
         "```py\nprint()\n```\n"]
# Llama 3 and Qwen 2.5; in Llama 3, up to three digits form one token
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


@dataclasses.dataclass(frozen=True)
class Published:
    """A published template and the properties of its tokenizer.

    Attributes:
        special: special tokens; the first is BOS if `bos`, and the last is EOS.
        plain: added tokens that are not special, such as thinking tags.
        tokens: the kind of tokenizer: "bytes", "metaspace" (a word's token begins with its space)
        or "gemma" (SentencePiece without a mark at the start of the text).
        trims: whether the tokenizer trims whitespace from its offsets.
        nfc: whether the tokenizer applies NFC normalization first.
    """

    special: Sequence[str]
    bos: bool = True
    plain: Sequence[str] = ()
    tokens: str = "bytes"
    trims: bool = False
    nfc: bool = False


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
GEMMA = ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>")
MISTRAL = ("<s>", "[INST]", "[/INST]", "</s>")
TEMPLATES = {
    "llama-3.1": Published(("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                            "<|eot_id|>"), trims=True),
    "qwen2.5": Published(CHATML, bos=False, nfc=True),
    "qwen3": Published(CHATML, bos=False, plain=THINK, nfc=True),
    "gemma-2": Published(GEMMA, tokens="gemma"),
    "gemma-3": Published(GEMMA, tokens="gemma"),
    "mistral-7b-v0.3": Published(MISTRAL, tokens="metaspace"),
    "mistral-nemo": Published(MISTRAL, trims=True),
    "smollm2": Published(CHATML, bos=False),
    "deepseek-r1-distill": Published(("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
                                      "<｜end▁of▁sentence｜>"), plain=THINK, trims=True),
}


def source(name: str) -> str:
    """Return the source of a template."""
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


@functools.cache
def make_tokenizer(name: str) -> Any:
    """Train a small tokenizer of the same kind as that of the template's models."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    made = TEMPLATES[name]
    core = _byte_level(made) if made.tokens == "bytes" else _sentencepiece(made.tokens == "gemma")
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in made.special])
    core.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in made.plain])
    named = {"bos_token": made.special[0]} if made.bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=source(name),
                                   eos_token=made.special[-1], clean_up_tokenization_spaces=False,
                                   **named)


def _byte_level(made: Published) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
    from tokenizers import pre_tokenizers as split_by

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = split_by.Sequence([
        split_by.Split(Regex(SPLIT), "isolated"),
        split_by.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=made.trims)
    if made.nfc:
        core.normalizer = normalizers.NFC()
    core.train_from_iterator(WORDS * 20, trainers.BpeTrainer(
        vocab_size=600, show_progress=False,
        initial_alphabet=sorted(split_by.ByteLevel.alphabet())))
    return core


def _sentencepiece(gemma: bool) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as split_by

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = split_by.Sequence([  # line breaks and punctuation are not merged with words
        split_by.Split(Regex(r"\n+|[^\s\w]+"), "isolated"),
        split_by.Metaspace(prepend_scheme="never")])
    spaced = "".join(f" {word}" for word in " ".join(WORDS).split())
    raw.train_from_iterator([*WORDS, spaced] * 20, trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>"], show_progress=False))
    table = json.loads(raw.to_str())
    vocabulary = table["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    table["model"].update(byte_fallback=True, fuse_unk=True)
    core = Tokenizer.from_str(json.dumps(table))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        core.normalizer = normalizers.Replace(" ", "▁")
        core.pre_tokenizer = split_by.Split(" ", behavior="merged_with_previous")
    else:
        core.pre_tokenizer = split_by.Metaspace(prepend_scheme="first", split=False)
        steps.append(decoders.Strip(" ", 1, 0))
    core.decoder = decoders.Sequence(steps)
    return core


CHATML_EMPTY = """\
{t0}<|im_start|>system
<|im_end|>
{t1}<|im_start|>user
{u1}Why?{t1}<|im_end|>
{t2}<|im_start|>assistant
"""
FENCED = "So:\n```py\nprint(1)  # the sea\n```\nthe end"
COMMON_CONTENTS = {  # (user, assistant), suitable for every tokenizer
    "code": ("What does\n~~~\nx = [0]\n~~~\ndo?", FENCED),
    "emoji": ("🎉 the 👩‍👩‍👧‍👦 sea 🌊", "🌊🌊"),
    "cjk": ("東京は日本の首都です。", "你好,世界! 안녕하세요"),
    "words of templates": ("user", "assistant"),
    "inner blank lines": ("the\n\n\nsea", "the sea\n\n  the ship\n\tend"),
}


def says(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Return a conversation of alternating messages that begins with the user."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": text}
                   for i, text in enumerate(contents)]


def marked(tokenizer: Any, row: Any) -> str:
    """Return a row's text with a mark {kinds and turn} before every change of kind or turn."""
    ids, out = row.tokens.tolist(), ""
    here = [(int(k), int(t)) for k, t in zip(row.kind, row.turn, strict=True)]
    cuts = [i for i in range(len(ids)) if not i or here[i] != here[i - 1]]
    for low, high in zip(cuts, [*cuts[1:], len(ids)], strict=True):
        letters = "".join(letter for bit, letter in LETTERS.items() if here[low][0] & bit)
        text = tokenizer.decode(ids[:high])[len(tokenizer.decode(ids[:low])):]
        out += f"{{{letters}{here[low][1]}}}{text}"
    return out


def selected(tokenizer: Any, batch: Any, where: Any, row: int = 0) -> dict[int, str]:
    """Return, by turn, the text of the tokens in a batch's row that `where` selects."""
    chosen = np.asarray(jp.where.holds(where.encode(), batch))[row]
    out: dict[int, list[int]] = {}
    for token, turn in zip(batch.tokens[row][chosen].tolist(), batch.turn[row][chosen].tolist(),
                           strict=True):
        out.setdefault(turn, []).append(token)
    return {turn: tokenizer.decode(ids) for turn, ids in out.items()}
