"""Tokenizer classes of transformers that use only a part of tokenizer.json."""

from __future__ import annotations

import json

import pytest
import support as s
from jaxpersona.ckpts.tokenizer import read_tokenizer
from tokenizers import Tokenizer, pre_tokenizers

TEXT = "a 12 345"


def write(folder, kind, splits, special="<|im_end|>"):
    """Write a byte-level tokenizer with merges of digits and the name of a class."""
    core = s.byte_tokenizer().backend_tokenizer
    table = json.loads(core.to_str())
    vocabulary = table["model"]["vocab"]
    for pair in ("12", "34"):
        vocabulary[pair] = len(vocabulary) + 2  # after the added tokens
        table["model"]["merges"].append(list(pair))
    core = Tokenizer.from_str(json.dumps(table))
    core.pre_tokenizer = splits
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": kind, "eos_token": special, "unk_token": special,
         "bos_token": special}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return core


DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                  pre_tokenizers.ByteLevel(add_prefix_space=False)])
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def test_a_class_that_splits_differently_from_the_file_is_named(tmp_path):
    """As for SmolLM2, whose folder names GPT2Tokenizer."""
    core = write(tmp_path, "GPT2Tokenizer", DIGITS)
    with pytest.warns(UserWarning, match="tokenizer.json: GPT2Tokenizer of transformers splits "
                                         "texts differently from this file; it is used") as caught:
        tokenizer = read_tokenizer(tmp_path)
    assert len(caught) == 1 and str(tmp_path) in str(caught[0].message)
    assert tokenizer(TEXT).input_ids != core.encode(TEXT).ids


@pytest.mark.parametrize(("kind", "splits"), [
    ("PreTrainedTokenizerFast", DIGITS), ("GPT2Tokenizer", WORDS)], ids=["whole", "equal"])
def test_a_tokenizer_that_is_that_of_the_file_is_read_without_a_word(tmp_path, kind, splits):
    """Warnings are errors in this test suite. The remedy in the warning is the first case."""
    core = write(tmp_path, kind, splits)
    core.enable_truncation(3)
    core.enable_padding(length=9)
    core.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path)
    core.no_truncation()
    core.no_padding()
    assert tokenizer(TEXT).input_ids == core.encode(TEXT).ids
