"""Tokenizers built from the metadata of GGUF files: stop tokens, added tokens and vocabularies."""

from __future__ import annotations

import numpy as np
import pytest
from jaxpersona.ckpts import gguf_tokenizer
from tokenizers import pre_tokenizers

from jaxpersona.errors import UserError

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def fields(kind, tokens, kinds=None, architecture="llama", **more):
    kinds = {} if kinds is None else {"token_type": np.array(kinds)}
    own = {"model": kind, "tokens": tokens, **kinds, **more}
    return {"general.architecture": architecture,
            **{f"tokenizer.ggml.{key}": value for key, value in own.items()}}


def byte_level(extra, **more):
    """Return the fields of a byte-level vocabulary with control tokens after its letters."""
    kinds = [1] * len(LETTERS) + [3] * len(extra)
    own = {"kinds": kinds, "merges": [], "pre": "gpt-2", **more}
    return fields("gpt2", [*LETTERS, *extra], **own)


def texts(made, text, **more):
    tokenizer = gguf_tokenizer.build(made)
    return tokenizer.convert_ids_to_tokens(tokenizer(text, **more).input_ids)


def test_known_ends_of_turn_are_stop_tokens_even_if_the_metadata_omits_them():
    """Also those whose type is another one or missing; the ids of the metadata come first."""
    tokens = ["a", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<|im_end|>", "<|eom_id|>"]
    made = fields("gpt2", tokens, [1, 3, 3, 1, 3, 1], eos_token_id=2)
    assert gguf_tokenizer.stop_ids(made) == (2, 1, 3, 4, 5)
    assert gguf_tokenizer.stop_ids(fields("gpt2", tokens)) == (1, 2, 3, 4, 5)
    made |= {"tokenizer.ggml.eom_token_id": 5, "tokenizer.ggml.eot_token_id": 0}
    assert gguf_tokenizer.stop_ids(made) == (2, 0, 5, 1, 3, 4)
    assert gguf_tokenizer.stop_ids({}) == ()


def test_a_file_may_say_that_texts_end_with_eos():
    ends = {"bos_token_id": len(LETTERS), "eos_token_id": len(LETTERS) + 1}
    for more, want in (({"add_eos_token": True}, ["a", "<e>"]), ({}, ["a"]),
                       ({"add_eos_token": True, "add_bos_token": True}, ["<s>", "a", "<e>"])):
        assert texts(byte_level(["<s>", "<e>"], **ends, **more), "a") == want


def test_added_tokens_are_matched_whole_and_only_control_tokens_are_special():
    tokens = ["<think>", "<|im_end|>"]
    made = byte_level(tokens, kinds=[1] * len(LETTERS) + [4, 3])
    tokenizer = gguf_tokenizer.build(made)
    ids = tokenizer("a<think>b<|im_end|>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "<think>", "b", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b"


@pytest.mark.parametrize("kind", [1, 4, None])
def test_a_known_end_of_turn_is_matched_whole_and_special_whatever_its_type(kind):
    kinds = None if kind is None else [1] * len(LETTERS) + [kind]
    made = fields("gpt2", [*LETTERS, "<|im_end|>"], kinds, merges=[], pre="smollm")
    tokenizer = gguf_tokenizer.build(made)
    ids = tokenizer("a<|im_end|>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "<|im_end|>"]
    assert ids[-1:] == list(gguf_tokenizer.stop_ids(made))
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a"


@pytest.mark.parametrize(("pre", "want"), [("llama-bpe", ["abc"]), ("smollm", ["a", "b", "c"])])
def test_a_word_of_the_vocabulary_is_kept_whole_by_llama_3_alone(pre, want):
    assert texts(byte_level(["abc"], pre=pre, kinds=[1] * (len(LETTERS) + 1)), "abc") == want


def test_gemma_merges_by_id_and_has_tokens_of_several_spaces():
    """GGUF files store them as spaces; no space is added before a text."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "b", "c", "▁", "  ", "bc", "ab"]
    scores = np.array([0.0] * 9 + [-9.0, -1.0])
    made = fields("llama", tokens, [3, 3, 3, 2] + [1] * 7, "gemma2", scores=scores, bos_token_id=2,
                  eos_token_id=1, unknown_token_id=3, padding_token_id=0)
    assert texts(made, "abc  a") == ["<bos>", "a", "bc", "▁▁", "a"]
    tokenizer = gguf_tokenizer.build(made)
    assert tokenizer.decode(tokenizer("abc  a").input_ids, skip_special_tokens=True) == "abc  a"
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 3)
    llama = {**made, "general.architecture": "llama", "tokenizer.ggml.add_space_prefix": False}
    assert texts(llama, "abc") == ["<bos>", "ab", "c"]  # by score


SPACED = pytest.mark.filterwarnings("ignore:.*adds a space before a text")


def test_derived_merges_are_in_the_order_of_the_whole_tokens():
    """By descending score, then by the lengths of the left and the right token."""
    words = ["a", "b", "ab", "aa", "aab", "aba", "abab", "bab", "▁", "▁a", "▁ab", "é", "éa"]
    scores = [0.0, 0.0, -3.0, -2.0, -5.0, -5.0, -1.0, -3.0, 0.0, -4.0, -5.0, 0.0, -3.0]
    want = []
    for score, token in zip(scores, words, strict=True):
        want += [(score, i, len(token) - i, (token[:i], token[i:])) for i in range(1, len(token))
                 if token[:i] in words and token[i:] in words]
    want.sort(key=lambda merge: merge[:3], reverse=True)
    found = gguf_tokenizer._derive_merges({word: i for i, word in enumerate(words)}, scores)
    assert found == [merge[3] for merge in want] and len(found) == 13
    assert gguf_tokenizer._derive_merges({"a": 0, "b": 1}, [0.0, 0.0]) == []


def test_a_space_is_added_at_the_start_of_a_text_alone_and_the_file_is_named():
    """As by transformers' reader; llama.cpp adds a space after each special token as well."""
    tokens = ["<unk>", "<s>", "▁", "H", "i", "Hi", "▁Hi"]
    made = fields("llama", tokens, [2, 3, 1, 1, 1, 1, 1], unknown_token_id=0, bos_token_id=1,
                  scores=np.array([0.0] * 5 + [-1.0, -2.0]), add_bos_token=False)
    with pytest.warns(UserWarning, match="adds a space before a text .* llama.cpp also adds one "
                                         "after every special token") as caught:
        assert texts(made, "Hi<s>Hi") == ["▁Hi", "<s>", "Hi"]
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="adds a space before a text"):
        assert texts(made, "<s>Hi") == ["<s>", "Hi"]


def test_merges_of_a_file_are_used_instead_of_its_scores():
    made = fields("llama", ["<unk>", "a", "b", "c", "bc", "ab"], unknown_token_id=0,
                  scores=np.array([0.0] * 4 + [-1.0, -9.0]), merges=["a b", "b c"],
                  add_space_prefix=False, add_bos_token=False)
    assert texts(made, "abc") == ["ab", "c"]


@pytest.mark.parametrize(("changes", "words"), [
    ({"ggml.token_type": np.ones(3)}, "token_type must contain one integer per token"),
    ({"ggml.merges": ["a b c"]}, "merges must contain strings of two tokens"),
    ({"ggml.model": "llama", "ggml.scores": np.ones(3)}, "scores must contain one number per"),
    ({"ggml.tokens": ["a" * 1025]}, "must contain strings of at most 1024 characters"),
    ({"chat_template": 5}, "chat_template is 5; it must be a string"),
])
def test_a_damaged_vocabulary_is_named(changes, words):
    made = byte_level([]) | {f"tokenizer.{key}": value for key, value in changes.items()}
    if "ggml.scores" in changes:
        del made["tokenizer.ggml.merges"]
    with pytest.raises(UserError, match=words):
        gguf_tokenizer.build(made)


@SPACED
def test_a_sentencepiece_vocabulary_merges_by_score():
    words = ["he", "ll", "hell", "o", "▁hello", "hello", "▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"hel", *words]
    scores = np.array([0.0] * 262 + [-1.0, -2.0, -3.0, -9.0, -5.0, -4.0, -9.0])
    kinds = np.array([2, 3, 3, *[6] * 256, *[1] * 10])
    fields = {"general.architecture": "llama", "tokenizer.ggml.model": "llama",
              "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores,
              "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.bos_token_id": 1,
              "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}
    tokenizer = gguf_tokenizer.build(fields)
    ids = tokenizer("hello é").input_ids
    assert [tokens[i] for i in ids] == ["<s>", "▁hello", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello é"
    bare = gguf_tokenizer.build(fields | {"tokenizer.ggml.add_space_prefix": False,
                                          "tokenizer.ggml.add_bos_token": False})
    assert [tokens[i] for i in bare("hello</s>").input_ids] == ["hello", "</s>"]


@pytest.mark.parametrize(("pre", "begins"), [("llama-bpe", True), ("smollm", False)])
def test_a_file_that_does_not_say_whether_texts_begin_with_bos(pre, begins):
    """Texts begin with BOS in Llama 3's tokenizers, but not in SmolLM's."""
    tokens = [*LETTERS, "<bos>"]
    fields = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2",
              "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
              "tokenizer.ggml.merges": [], "tokenizer.ggml.bos_token_id": len(tokens) - 1}
    for more, first in (({}, begins), ({"tokenizer.ggml.add_bos_token": not begins}, not begins)):
        ids = gguf_tokenizer.build(fields | more)("ab").input_ids
        assert [tokens[i] for i in ids] == ["<bos>"] * first + ["a", "b"]


def digits(text):
    """Return the tokens of a text in a vocabulary of byte characters, split like SmolLM's."""
    tokens = [*LETTERS, "ĠĠ"]
    fields = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2",
              "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
              "tokenizer.ggml.merges": ["Ġ Ġ"]}
    return [tokens[i] for i in gguf_tokenizer.build(fields)(text).input_ids]


def test_digits_are_split_before_spaces_are_grouped():
    """llama.cpp and the released tokenizer split digits first; transformers' reader does not."""
    assert digits("a  12") == ["a", "ĠĠ", "1", "2"]


@pytest.mark.parametrize(("pre", "words"), [
    ({}, "tokenizer.ggml.pre of this GGUF file is missing; texts are split as for GPT-2"),
    ({"pre": "default"}, "tokenizer.ggml.pre of this GGUF file is 'default'; texts are split as"),
])
def test_a_file_that_does_not_say_how_texts_are_split(pre, words):
    made = fields("gpt2", [*LETTERS, "12"], merges=["1 2"], **pre)
    with pytest.warns(UserWarning, match=words) as caught:
        assert texts(made, "12a") == ["12", "a"]
    assert len(caught) == 1


def test_qwen_texts_are_normalized_as_in_the_released_tokenizer():
    from transformers import Qwen2Tokenizer

    tokens = [*LETTERS, "Ã©", "Ġa", "<|endoftext|>", "<|im_end|>"]
    merges = ["Ã ©", "Ġ a"]
    made = fields("gpt2", tokens, [1] * (len(tokens) - 2) + [3, 3], "qwen2", merges=merges,
                  pre="qwen2")
    ours = gguf_tokenizer.build(made)
    theirs = Qwen2Tokenizer({token: i for i, token in enumerate(tokens)},
                            [tuple(merge.split(" ")) for merge in merges],
                            additional_special_tokens=["<|im_end|>"])
    for text in ("e\u0301", "é", "caf\u0065\u0301 a1234<|im_end|>\ne\u0301",
                 "\u1112\u1161\u11ab\u1100\u1173\u11af", "Vie\u0323\u0302t", "ﬁ  \u212b",
                 "\u200b "):
        assert ours(text).input_ids == theirs(text).input_ids, text
    assert texts(made, "e\u0301") == ["Ã©"]
    assert texts(made | {"tokenizer.ggml.pre": "gpt-2"}, "e\u0301") == ["e", "Ì", "ģ"]
