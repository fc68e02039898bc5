"""Texts, prompts and comparisons that the tests of released checkpoints share."""

from __future__ import annotations

from typing import Any

import hf
import jax
import numpy as np

import jaxpersona as jp

LONG = "The lighthouse keeper counted the ships that passed and wrote their names in a book. " * 60
TALKS = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Überraschung: 東京は日本の首都です。 🌊 Translate this."}],
    [{"role": "user", "content": "def fibonacci(n):\n    \"\"\"Return the n-th number.\"\"\"\n"}],
    [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."},
     {"role": "user", "content": "Name another one, and say why you like it."}],
)
TEXTS = (
    "Hello, world!", " leading space", "trailing space ", "two  spaces   three", "\ttab\n\nlines\n",
    "I'm, you're, we'll, they've, it's, he'd; I'M, YOU'RE", "don't can't won't", "e.g. i.e. etc.",
    "x=1;y=22;z=333;4444", "3.14159, 1,000,000 and 2^10", "2024-02-29T23:59:59Z", "+49 1234-56",
    "def f(x):\n    return x ** 2\n", "for (int i = 0; i < n; ++i) {\n\ta[i] += b[i];\n}",
    "SELECT * FROM t WHERE a != 'b';", "<div class=\"a\">&amp;</div>", "{\"key\": [1, 2, null]}",
    "https://example.org/a?b=c&d=%20#e", "C:\\Windows\\System32", "$x^2 + \\frac{1}{2}$",
    "😀", "👩‍👩‍👧‍👦 family", "🌊🌊🌊", "🇩🇪🇯🇵", "text 🎉 text", "✓ ✗ → ← ∞ ≤", "§ № ± µ °C",
    "東京は日本の首都です。", "你好,世界!", "안녕하세요 세계", "こんにちは、カタカナ",
    "中文 mixed with English",
    "Привет, мир!", "Γειά σου Κόσμε", "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก",
    "naïve café résumé Ünïcödé", "straße ŁÓDŹ İstanbul", "ﬁ ligature", "a\u200bb zero width",
    "ALL CAPS AND lower", "CamelCaseWords and snake_case_words", "supercalifragilistic",
    "!!! ??? ... --- ___ ***", "((nested [brackets {here}]))", "\"quotes\" 'single' `code`",
    "<|im_start|>user\nHi<|im_end|>\n<start_of_turn>model\n", "<bos>text<eos><|endoftext|></s>",
)
DECOMPOSED = ("cafe\u0301 au lait", "\u1112\u1161\u11ab\u1100\u1173\u11af", "Vie\u0323\u0302t Nam",
              "A\u030a, n\u0303 and o\u0308<|im_end|>e\u0301")


def prompts_of(tokenizer: Any) -> list[list[int]]:
    """Return the token ids of a text of 600 tokens and of the conversations.

    Without a chat template, the contents of a conversation are joined by line breaks.
    """
    def encode(talk: list[dict[str, str]]) -> list[int]:
        if not tokenizer.chat_template:
            return tokenizer("\n".join(message["content"] for message in talk)).input_ids
        return tokenizer.apply_chat_template(talk, add_generation_prompt=True,
                                             return_dict=True).input_ids

    return [tokenizer(LONG).input_ids[:600], *map(encode, TALKS)]


def greedy(theirs: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Return the replies of a transformers model, including the stop token."""
    import torch

    with torch.no_grad():
        return [theirs.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=new,
            do_sample=False, top_p=None, top_k=None, temperature=None,
            repetition_penalty=None)[0, len(ids):].tolist() for ids in prompts]


def apart(got: Any, want: Any) -> float:
    """Return the largest ‖a − b‖₂ / ‖b‖₂ of all vectors along the last axis."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float((np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)).max())


def check_forward(model: Any, prompts: list[list[int]], wanted: list[tuple[Any, Any]]) -> None:
    """Compare the residuals at every layer and position, and the logits at every position.

    Args:
        wanted: the results of `hf.residuals`, one per prompt.
    """
    forward = jax.jit(jp.forward)
    for ids, (stream, logits) in zip(prompts, wanted, strict=True):
        out = forward(model.params, model.config, jp.batch([np.array(ids)]),
                      capture=jp.capture.full(jp.everywhere))
        found = out.captured["full"].value[0]
        assert found.shape == stream[:, 0].shape and found.shape[1] == len(ids)
        for layer, want in enumerate(stream):
            assert apart(found[layer], want[0]) <= 1e-4, layer
        assert apart(out.logits[0], logits[0]) <= 1e-4


def check_replies(model: Any, prompts: list[list[int]], replies: list[list[int]],
                  least: int) -> None:
    """Compare greedy replies, of which at least `least` tokens precede the stop tokens."""
    out = jp.generate(model, [np.array(ids) for ids in prompts],
                      max_new_tokens=max(map(len, replies)), batch_size=1)
    compared = 0
    for reply, stopped, want in zip(out.tokens, out.stopped, replies, strict=True):
        stop = next((i for i, token in enumerate(want) if token in model.stop_ids), len(want))
        assert stop >= len(want) - 1, "the reply of transformers goes on after a stop token"
        assert reply.tolist() == want[:stop] and stopped == (stop < len(want))
        compared += stop
    assert compared >= least


def residuals(theirs: Any, prompts: list[list[int]]) -> list[tuple[Any, Any]]:
    """Return `hf.residuals` of each prompt by itself."""
    return [hf.residuals(theirs, [ids]) for ids in prompts]
