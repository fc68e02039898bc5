"""Released GGUF files, loaded directly, compared with transformers' GGUF reader."""

from __future__ import annotations

import gc
import resource
import subprocess
import sys

import hf
import jax
import numpy as np
import pytest

import jaxpersona as jp

from .conftest import CHECKPOINTS, converted, gguf_file

pytestmark = pytest.mark.real
NAMES = [pytest.param(name, marks=pytest.mark.large if "1.5b" in name else ())
         for name in CHECKPOINTS]
NEW = 64
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


@pytest.fixture(scope="module")
def reference():
    """Return a function from a checkpoint's name to transformers' tokenizer for its GGUF file."""
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    return lambda name: AutoTokenizer.from_pretrained(converted(name), trust_remote_code=False)


@pytest.mark.parametrize("name", NAMES)
def test_token_ids_are_those_of_transformers(name, reference):
    assert len(TEXTS) == 50
    model, theirs = jp.load(gguf_file(name)), reference(name)
    for text in TEXTS:
        ids = model.tokenizer(text).input_ids
        assert ids == theirs(text).input_ids, text
        assert model.tokenizer.decode(ids) == theirs.decode(ids), text
    assert model.template == bool(theirs.chat_template)


@pytest.mark.parametrize("name", NAMES)
def test_residuals_logits_and_greedy_tokens_are_those_of_transformers(name, reference):
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = reference(name)
    prompts = [tokenizer(LONG).input_ids[:600]]
    for talk in TALKS:
        prompts.append(tokenizer.apply_chat_template(
            talk, add_generation_prompt=True, return_dict=True).input_ids
            if tokenizer.chat_template else
            tokenizer("\n".join(message["content"] for message in talk)).input_ids)
    assert len(prompts[0]) == 600
    theirs = AutoModelForCausalLM.from_pretrained(
        converted(name), dtype=torch.float32, trust_remote_code=False).eval()
    wanted = [hf.residuals(theirs, [ids]) for ids in prompts]
    replies = []
    with torch.no_grad():
        for ids in prompts:
            made = theirs.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)),
                                   max_new_tokens=NEW, do_sample=False, top_p=None, top_k=None,
                                   temperature=None, repetition_penalty=None)
            replies.append(made[0, len(ids):].tolist())
    del theirs
    gc.collect()
    model = jp.load(gguf_file(name), dtype="float32")
    forward = jax.jit(jp.forward)
    for ids, (stream, logits) in zip(prompts, wanted, strict=True):
        out = forward(model.params, model.config, jp.batch([np.array(ids)]),
                      capture=jp.capture.full(jp.everywhere))
        for layer, want in enumerate(stream):
            assert hf.distance(out.captured["full"].value[0, layer], want[0]) <= 1e-4, layer
        assert hf.distance(out.logits[0], logits[0]) <= 1e-4
    out = jp.generate(model, [np.array(ids) for ids in prompts], max_new_tokens=NEW, batch_size=1)
    for reply, want in zip(out.tokens, replies, strict=True):
        stop = next((i for i, token in enumerate(want) if token in model.stop_ids), len(want))
        assert reply.tolist() == want[:stop]


LOADED = """
import resource, sys
sys.modules["torch"] = None  # PyTorch is not needed
import jaxpersona as jp, jax
jp.load("random:qwen3-mini")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = jp.load(sys.argv[1], dtype="float32")
size = sum(x.nbytes for x in jax.tree.leaves(model.params))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
@pytest.mark.parametrize("name", NAMES)
def test_loading_takes_at_most_a_quarter_more_than_the_parameters(name):
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
    out = subprocess.run([sys.executable, "-c", LOADED, str(gguf_file(name))], check=True,
                         capture_output=True, text=True, timeout=1200)
    assert float(out.stdout) <= 1.25
