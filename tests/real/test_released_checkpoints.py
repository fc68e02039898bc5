"""Released models, saved by transformers, compared with it: logits and greedy replies."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import jaxpersona as jp

from .conftest import CHECKPOINTS, converted

pytestmark = pytest.mark.real
NEW = 64
PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea in winter, and explain every line of it afterwards.",
    "def fibonacci(n):\n    \"\"\"Return the n-th number.\"\"\"\n",
    "Überraschung: 東京は日本の首都です。 🌊🌊 Translate this, please.",
    "A farmer has seventeen sheep. All but nine run away. How many are left? " * 12,
)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.large if "1.5b" in name else ()) for name in CHECKPOINTS])
def test_logits_and_greedy_replies_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = converted(name)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    if tokenizer.chat_template:
        prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}],
                                                 add_generation_prompt=True, return_dict=True)
                   .input_ids for text in PROMPTS]
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False).eval()
    with torch.no_grad():
        logits = [theirs(torch.tensor([ids])).logits[0].numpy() for ids in prompts]
        replies = [theirs.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)),
                                   max_new_tokens=NEW, do_sample=False, top_p=None, top_k=None,
                                   temperature=None, repetition_penalty=None)[0, len(ids):].tolist()
                   for ids in prompts]
    del theirs
    gc.collect()
    model = jp.load(folder, dtype="float32")
    for ids, want in zip(prompts, logits, strict=True):
        out = jp.forward(model.params, model.config, jp.batch([np.array(ids)]))
        got = np.asarray(out.logits)[0]
        apart = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
        assert apart.max() <= 1e-4
    if model.template:  # through the public API, with text as input
        out = jp.generate(model, [[{"role": "user", "content": text}] for text in PROMPTS],
                          max_new_tokens=NEW, batch_size=1)
        assert [row.tokens.tolist() for row in out.rows] == prompts
    else:
        out = jp.generate(model, [np.array(ids) for ids in prompts], max_new_tokens=NEW,
                          batch_size=1)
    for reply, stopped, want in zip(out.tokens, out.stopped, replies, strict=True):
        stop = next((i for i, token in enumerate(want) if token in model.stop_ids), len(want))
        assert reply.tolist() == want[:stop]
        assert stopped == (stop < len(want))
