"""Released GGUF files, loaded directly, compared with transformers' GGUF reader."""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
import unicodedata

import pytest
from jaxpersona.ckpts import gguf_model

import jaxpersona as jp

from . import released
from .conftest import CHECKPOINTS, converted, gguf_file

pytestmark = pytest.mark.real
NAMES = [pytest.param(name, marks=pytest.mark.large if "1.5b" in name else ())
         for name in CHECKPOINTS]
NEW = 64
LEAST = 100  # tokens of the five replies, which may end before 64 tokens each


@pytest.fixture(scope="module")
def reference():
    """Return a function from a checkpoint's name to transformers' tokenizer for its GGUF file."""
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    return lambda name: AutoTokenizer.from_pretrained(converted(name), trust_remote_code=False)


@pytest.mark.parametrize("name", NAMES)
def test_token_ids_are_those_of_transformers(name, reference):
    assert len(released.TEXTS) == 50
    model, theirs = jp.load(gguf_file(name)), reference(name)
    special = [token for token in theirs.all_special_tokens if token]
    mixed = [f"{a}{text} {a} \n{a}{a}" for a, text in zip(special, released.TEXTS, strict=False)]
    for text in (*released.TEXTS, *mixed):
        ids = model.tokenizer(text).input_ids
        assert ids == theirs(text).input_ids, text
        assert model.tokenizer.decode(ids) == theirs.decode(ids), text
    assert mixed and model.template == bool(theirs.chat_template)


@pytest.mark.parametrize("name", NAMES)
def test_decomposed_letters_are_composed_for_qwen_alone(name, reference):
    """As in the released tokenizers. transformers has the step when it reads the saved folder."""
    ours, theirs = jp.load(gguf_file(name)).tokenizer, reference(name)
    for text in released.DECOMPOSED:
        composed = unicodedata.normalize("NFC", text)
        ids = ours(text).input_ids
        assert composed != text and ids == theirs(text).input_ids, text
        assert (ids == ours(composed).input_ids) == ("qwen" in name), text
        assert ours.decode(ids, skip_special_tokens=True) == (
            composed if "qwen" in name else text).replace("<|im_end|>", "" if (
                "gemma" not in name) else "<|im_end|>")


def test_numbers_of_smollm_are_split_as_in_its_released_tokenizer():
    """Digits by themselves, then GPT-2's words; transformers' GGUF reader splits differently."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = gguf_file("SmolLM2-135M-Instruct.Q4_1")
    fields = gguf_model.open_checkpoint(path).fields
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    stored = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    stored.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ours = jp.load(path).tokenizer
    plain = [text for text in released.TEXTS if "<|" not in text]
    for text in (*plain, *released.DECOMPOSED[:3], "½ ¼ ² ³ №", "a  12", "x 3  4\n5", "٣ ५ Ⅷ"):
        assert ours(text).input_ids == stored.encode(text).ids, text


@pytest.mark.parametrize("name", NAMES)
def test_residuals_logits_and_greedy_tokens_are_those_of_transformers(name, reference):
    """At every position: the first token has by far the largest residual."""
    import torch
    from transformers import AutoModelForCausalLM

    prompts = released.prompts_of(reference(name))
    assert len(prompts) == 5 and len(prompts[0]) == 600
    theirs = AutoModelForCausalLM.from_pretrained(
        converted(name), dtype=torch.float32, trust_remote_code=False).eval()
    wanted = released.residuals(theirs, prompts)
    replies = released.greedy(theirs, prompts, NEW)
    del theirs
    gc.collect()
    model = jp.load(gguf_file(name), dtype="float32")
    released.check_forward(model, prompts, wanted)
    released.check_replies(model, prompts, replies, LEAST)


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
