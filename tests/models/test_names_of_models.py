"""What the name of a model may be, and the stop tokens and settings beside its weights."""

from __future__ import annotations

import json
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from jaxpersona.ckpts import gguf_config, loading
from jaxpersona.ckpts.hub import _NOT_FETCHED, _PATTERNS

import jaxpersona as jp
from jaxpersona.models import nn
from jaxpersona.models.batch import batch
from jaxpersona.models.cache import (
    Cache,
    advance,
    assign_slots,
    by_slot,
    init_cache,
    kept_dtype,
    set_lines,
)


@pytest.mark.parametrize(("name", "good"), [
    ("a/b", True), ("owner-1/model.v2_x", True), ("a", False), ("a/b/c", False), ("a/", False),
    ("/b", False), ("./b", False), ("a/..", False), ("a/-", False), ("a b/c", False), ("", False)])
def test_a_repository_has_an_owner_and_a_name(name, good):
    """Both need a letter or digit, and neither has a space."""
    assert loading._is_repository(name) is good


@pytest.mark.parametrize(("name", "words"), [
    ("qwen3-8b", r"^qwen3-8b: no such folder \(random:qwen3-8b has random weights; for a released "
                 r"model, give its owner/name on the Hub\); a model is a folder, a .gguf file"),
    ("Qwen3-8B", "random:qwen3-8b has random weights"), ("lama-3.1-8b", "random:llama-3.1-8b has"),
    ("mimi", r"^mimi: no such folder \(did you mean mini\?\); a model is"),
    ("entirely-other", "^entirely-other: no such folder; a model is a folder"),
    ("absent.gguf", "absent.gguf: no such file"), ("random:qwen3-8", "preset 'qwen3-8' is unknown"),
])
def test_a_wrong_name_is_answered_with_the_nearest(name, words):
    """Presets have random weights, which is said."""
    with pytest.raises(ValueError, match=words):
        jp.load(name)


@pytest.mark.parametrize(("generation", "raw", "own", "wanted"), [
    (None, {}, None, ()), ({"eos_token_id": [7, 5]}, {"eos_token_id": 5}, 9, (7, 5, 9)),
    ({}, {"eos_token_id": [4, 4]}, 4, (4,)), ({"eos_token_id": 0}, {}, None, (0,)),
    ({"eos_token_id": 2**31 - 1}, {"eos_token_id": None}, 3, (2**31 - 1, 3)),
    ({"eos_token_id": True}, {}, None, "eos_token_id of generation_config.json is True"),
    ({}, {"eos_token_id": [1, -1]}, None, r"eos_token_id of config.json is \[1, -1\]"),
    ({}, {"eos_token_id": 2**31}, None, "eos_token_id of config.json is 2147483648"),
    ({}, {}, "end", "eos_token_id of the tokenizer is 'end'"),
    ([], {}, None, "generation_config.json: contains a list, not a JSON object"),
], ids=str)
def test_stop_tokens_are_collected_in_order_without_repetition(tmp_path, generation, raw, own,
                                                               wanted):
    """From generation_config.json, then config.json, then the tokenizer."""
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = types.SimpleNamespace(eos_token_id=own)
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            loading._stop_ids(tmp_path, raw, tokenizer)
    else:
        assert loading._stop_ids(tmp_path, raw, tokenizer) == wanted
        assert own is not None or loading._stop_ids(tmp_path, raw, None) == wanted


@pytest.mark.parametrize(("settings", "named"), [
    ({"do_sample": True, "min_p": 0.1}, "min_p=0.1"), ({"do_sample": True, "min_p": 0.0}, ""),
    ({"do_sample": True, "top_k": 0}, ""), ({"do_sample": True, "top_h": 0.4}, "top_h=0.4"),
    ({"do_sample": False, "min_p": 0.1, "top_k": 3, "top_h": 1}, ""), ({"top_k": 3}, ""),
    ({"num_beams": 2}, "num_beams=2"), ({"length_penalty": 1.0}, ""), ({"min_length": 1},
                                                                     "min_length=1"),
    ({"forced_eos_token_id": 0}, "forced_eos_token_id=0"), ({"suppress_tokens": None}, ""),
    ({"stop_strings": ["x"], "token_healing": True}, r"stop_strings=\['x'\], token_healing=True"),
], ids=str)
def test_settings_that_would_change_replies_are_named(tmp_path, settings, named):
    """Settings for sampling count only if the file asks for sampling."""
    if named:
        with pytest.warns(UserWarning, match=f"f: ignored {named}, which generate does not supp"):
            loading._warn_unfollowed(tmp_path / "f", settings)
    else:
        with warnings.catch_warnings(action="error"):
            loading._warn_unfollowed(tmp_path / "f", settings)


def test_the_configuration_and_the_tokenizer_are_downloaded_with_the_weights():
    """Named files of a repository, without duplicates of the weights."""
    assert _PATTERNS == ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
    assert "*/*.safetensors" in _NOT_FETCHED and "onnx/*" in _NOT_FETCHED


SIZES = {"block_count": 2, "context_length": 64, "embedding_length": 8, "feed_forward_length": 16,
         "attention.head_count": 2}


@pytest.mark.parametrize(("fields", "words"), [
    ({"rope.freq_base": 1.0}, ""), ({"rope.freq_base": 1e12}, ""),
    ({"rope.freq_base": 0.99}, "rope.freq_base is 0.99; it must be between 1 and 1e12"),
    ({"rope.freq_base": 1.1e12}, "it must be between 1 and 1e12"), ({"block_count": 1024}, ""),
    ({"block_count": 1025}, "llama.block_count is 1025; the maximum is 1024"),
    ({"context_length": 2**31 - 1}, ""), ({"context_length": 0}, "context_length is 0; it must be"),
    ({"context_length": True}, "context_length is True; it must be a positive integer"),
    ({"attention.layer_norm_rms_epsilon": float("inf")}, "is inf; it must be a finite number"),
    ({"attention.layer_norm_rms_epsilon": "x"}, "is 'x'; it must be a finite number"),
    ({"rope.scaling.type": 5}, "rope.scaling.type is 5; it must be a string"),
    ({"expert_count": "x"}, "llama.expert_count is 'x'; this value is not supported"),
    ({"attention.clamp_kqv": 0.0, "residual_scale": 1.0, "attention.causal": True}, ""),
    ({"attention.max_alibi_bias": 8.0}, "attention.max_alibi_bias is 8.0; this value"),
], ids=str)
def test_a_gguf_field_at_its_bound(fields, words):
    """Values on both sides of each bound, and neutral values of unsupported fields."""
    given = {"general.architecture": "llama", **{
        f"llama.{key}": value for key, value in {**SIZES, **fields}.items()}}
    shapes = {"token_embd.weight": (32, 8), "output.weight": (32, 8)}
    if words:
        with pytest.raises(ValueError, match=words):
            gguf_config.to_config(given, shapes, None, "m")
    else:
        gguf_config.to_config(given, shapes, None, "m")


@pytest.mark.parametrize(("given", "words"), [
    ({}, "^field general.architecture is missing$"),
    ({"general.architecture": 5}, "^field general.architecture is missing$"),
    ({"general.architecture": "bert"}, "^architecture is 'bert'; it must be one of llama, qwen2, "
                                       r"qwen3, gemma2, gemma3 \(Mistral models have arch")])
def test_a_gguf_file_has_a_known_architecture(given, words):
    """The message lists the architectures."""
    with pytest.raises(ValueError, match=words):
        gguf_config.to_config(given, {}, None, "m")


def test_tokens_get_the_next_free_slots_and_padding_gets_none():
    """Two rows with three and one cached tokens, and two and one new ones."""
    config = s.tiny_config()
    rows = batch([[5, 6], [7]])
    assert assign_slots(None, rows).tolist() == [[0, 1], [0, 2]]
    empty = init_cache(config, 2, 6)
    assert (empty.slots, len(empty.k), empty.k[0].shape) == (6, 3, (2, 2, 6, 12))
    assert (empty.position == -1).all() and not empty.next.any()
    held = Cache(empty.k, empty.v, jnp.array([[0, 1, 2, -1, -1, -1], [0] + [-1] * 5]),
                 jnp.array([3, 1]))
    slots = assign_slots(held, rows)
    assert slots.tolist() == [[3, 4], [1, 6]]
    after = advance(held, rows.replace(position=rows.position + np.array([[3], [1]], np.int32)),
                    slots)
    assert after.position.tolist() == [[0, 1, 2, 3, 4, -1], [0, 1, -1, -1, -1, -1]]
    assert after.next.tolist() == [5, 2]


def test_values_are_moved_to_the_slots_of_their_tokens():
    """By a gather, which has arbitrary values elsewhere, and by a scatter."""
    values = jnp.array([[10, 11, 12], [20, 21, 22]])
    moved, taken = by_slot(values, jnp.array([[1, 2, 9], [0, 9, 9]]), 4)
    assert taken.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert moved[taken].tolist() == [10, 11, 20]
    found = set_lines(jnp.zeros((2, 4), jnp.int32), values[:, 0], jnp.array([3, 4]), 1)
    assert found.tolist() == [[0, 0, 0, 10], [0] * 4]  # slot 4 does not exist


@pytest.mark.parametrize(("dtype", "wanted"), [
    ("float32", "float32"), ("bfloat16", "float32"), ("float16", "float32")])
def test_a_cache_on_a_cpu_is_kept_in_float32(dtype, wanted):
    """There, 16-bit values are converted to float32 before every product."""
    assert jnp.dtype(kept_dtype(jnp.ones(2, dtype))).name == wanted


@pytest.mark.parametrize(("window", "seen"), [
    (None, [0, 1, 2, 3]), (1, [3]), (2, [2, 3]), (3, [1, 2, 3]), (9, [0, 1, 2, 3])])
def test_a_query_sees_the_keys_within_its_window(window, seen):
    """Equal scores give the mean of the values that the last of four queries sees."""
    q, k = jnp.zeros((1, 4, 1, 2)), jnp.zeros((1, 1, 6, 2))
    v = jnp.asarray(np.array([1.0, 2, 4, 8, 99, 99])[None, None, :, None] * np.ones((1, 1, 6, 2)),
                    jnp.float32)
    places = jnp.array([[0, 1, 2, 3, 4, -1]])  # a later key, and an empty slot
    found = nn.attention(q, k, v, jnp.arange(4)[None], places, scale=1.0, window=window)
    assert float(found[0, 3, 0, 0]) == pytest.approx(np.mean([2**i for i in seen]))
    assert float(found[0, 0, 0, 0]) == pytest.approx(1.0)


def test_scores_are_scaled_and_then_capped():
    """softmax(c·tanh(scale·q·k/c)) of two keys, by hand."""
    q, k = jnp.full((1, 1, 1, 1), 3.0), jnp.array([[[[1.0], [2.0]]]])
    v, places = jnp.array([[[[0.0], [1.0]]]]), jnp.array([[0, 1]])
    for cap, score in ((None, lambda x: x), (4.0, lambda x: 4 * np.tanh(x / 4))):
        found = nn.attention(q, k, v, jnp.array([[1]]), places, scale=0.5, softcap=cap)
        weights = np.exp([score(0.5 * 3 * 1), score(0.5 * 3 * 2)])
        assert float(found[0, 0, 0, 0]) == pytest.approx(weights[1] / weights.sum(), rel=1e-5)


@pytest.mark.parametrize(("activation", "function"), [
    ("silu", jax.nn.silu), ("gelu_tanh", lambda x: jax.nn.gelu(x, approximate=True))])
def test_the_gate_of_the_mlp_is_activated_and_multiplied(activation, function):
    """With biases: down(act(gate(x) + b) · (up(x) + c)) + d."""
    layer = types.SimpleNamespace(
        gate_up=(jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 3.0]])), b_gate_f=jnp.array([0.5]),
        b_up_f=jnp.array([-1.0]), w_down_df=jnp.array([[1.0], [4.0]]),
        b_down_d=jnp.array([10.0, 20.0]))
    found = nn.mlp(jnp.array([[[1.0, 2.0]]]), layer, activation)
    inner = float(function(jnp.float32(2.5))) * 5
    np.testing.assert_allclose(found[0, 0], [inner + 10, 4 * inner + 20], rtol=1e-6)
