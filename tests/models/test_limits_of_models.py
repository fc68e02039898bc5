"""Values at the edges of what a configuration, a batch and a preset accept."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.models import nn
from jaxpersona.models.batch import batch, check_ids
from jaxpersona.models.config import ModelConfig, Rope
from jaxpersona.models.families import from_hf, to_hf
from jaxpersona.models.int8 import scheme, weights_note
from jaxpersona.models.model import check_model
from jaxpersona.models.params import Spec, layout, origin
from jaxpersona.models.prepared import in_int8, int8_layout

MINI = pathlib.Path(__file__).parents[2] / "ckpts" / "mini" / "config.json"
BASE = {"architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}


def test_the_preset_of_the_included_model_is_its_file_and_that_of_the_14b_model_is_released():
    """These two are in no other test."""
    assert jp.preset("qwen3-mini") == from_hf(json.loads(MINI.read_text()))
    found = jp.preset("qwen3-14b")
    assert (found.d_model, found.n_layers, found.n_heads, found.n_kv_heads, found.head_dim,
            found.d_ff) == (5120, 40, 40, 8, 128, 17_408)
    assert (found.vocab_size, found.max_context, found.rope) == (151_936, 40_960, Rope(1e6))
    assert not found.tied_embeddings and found.qk_norm and found.norm_eps == 1e-6
    with pytest.raises(ValueError, match="preset 'qwen3' is unknown; choose one of llama-3.2-1b, "):
        jp.preset("qwen3")


@pytest.mark.parametrize(("fields", "words"), [
    ({"n_layers": 0}, "n_layers is 0; it must be a positive integer"),
    ({"d_ff": 2.0}, "d_ff is 2.0; it must be a positive integer"),
    ({"n_kv_heads": 3}, r"n_kv_heads is 3; it must divide n_heads \(4\)"),
    ({"head_dim": 7}, "head_dim is 7; it must be even"),
    ({"windows": (None, None)}, r"windows has length 2; its length must be n_layers \(3\)"),
], ids=str)
def test_a_configuration_that_no_model_has_is_refused(fields, words):
    """Each message has the field, its value and the rule."""
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(s.tiny_config(), **fields)


def test_layers_with_a_window_have_the_local_rotary_embedding():
    """If the model has one."""
    config = s.tiny_config(windows=(4, None, 8), rope_local=Rope(5.0))
    assert [config.rope_at(i).theta for i in range(3)] == [5.0, 10_000.0, 5.0]
    assert dataclasses.replace(config, rope_local=None).rope_at(0).theta == 10_000.0


def test_rotary_frequencies_are_those_of_their_equations():
    """Computed by hand for four frequencies."""
    plain = nn.rope_frequencies(Rope(100.0), 8)
    np.testing.assert_allclose(plain, [1, 100**-0.25, 100**-0.5, 100**-0.75], rtol=1e-6)
    np.testing.assert_allclose(nn.rope_frequencies(Rope(100.0, "linear", 4.0), 8), plain / 4,
                               rtol=1e-6)
    # wave lengths 6.3, 19.9, 63, 199: the context has 20, 6.4, 2 and 0.64 waves
    scaled = nn.rope_frequencies(Rope(100.0, "llama3", 8.0, 1.0, 4.0, 128), 8)
    ratio = 128 * plain / (2 * math.pi)
    blend = np.clip((ratio - 1) / 3, 0, 1)
    assert blend[0] == blend[1] == 1 and 0 < blend[2] < 1 and blend[3] == 0
    np.testing.assert_allclose(scaled, blend * plain + (1 - blend) * plain / 8, rtol=1e-6)
    np.testing.assert_allclose(scaled[[0, 1, 3]], [plain[0], plain[1], plain[3] / 8], rtol=1e-6)


def test_rms_norm_has_an_offset_and_says_where_a_token_is_unknown():
    """Two values by hand; a sum of squares that overflows gives 0 or NaN."""
    x = jnp.array([[[3.0, 4.0], [1.0, 1.0], [1e20, 0.0]]])
    weight = jnp.array([1.0, 2.0])
    plain = nn.rms_norm(x, weight, 0.5, 0.0)[0, 0]
    np.testing.assert_allclose(plain, np.array([3, 8]) / math.sqrt(12.5 + 0.5), rtol=1e-6)
    np.testing.assert_allclose(nn.rms_norm(x, weight, 0.5, 1.0)[0, 0],
                               np.array([6, 12]) / math.sqrt(13), rtol=1e-6)
    assert nn.rms_norm(x, weight, 0.0, 0.0)[0, 2].tolist() == [0, 0]
    assert np.isnan(nn.rms_norm(x, weight, 0.0, 0.0, overflow_to_nan=True)[0, 2]).all()
    known = nn.rms_norm(x, weight, 0.0, 0.0, known=jnp.array([[True, False, True]]))
    assert np.isnan(known).any(-1).tolist() == [[False, True, False]]


@pytest.mark.parametrize(("ids", "vocabulary", "words"), [
    ([0, 2**31 - 1], None, ""), ([0, 31], 32, ""), ([], 32, ""),
    ([5, 2**31], None, r"^x contains the token id 2147483648; token ids must be in 0…2147483647$"),
    ([5, 32, 40], 32, r"^x contains the token id 32; token ids must be in 0…31, the row indices of "
                      "the model's embedding$"),
    ([[5], [-1]], 32, "^x contains the token id -1; "),
], ids=str)
def test_token_ids_are_rows_of_the_embedding(ids, vocabulary, words):
    """Without a vocabulary, any 32-bit integer of at least 0; the first wrong id is named."""
    if not words:
        check_ids(np.array(ids), vocabulary, "x")
        return
    with pytest.raises(ValueError, match=words):
        check_ids(np.array(ids), vocabulary, "x")


def test_a_token_that_the_tokenizer_has_and_the_model_does_not_is_written_out():
    """Ids that the tokenizer does not have are only numbers."""
    tokenizer = types.SimpleNamespace(__len__=lambda: 40, convert_ids_to_tokens=lambda i: f"<{i}>")

    class Known(types.SimpleNamespace):
        def __len__(self):
            return 40

    known = Known(convert_ids_to_tokens=tokenizer.convert_ids_to_tokens)
    with pytest.raises(ValueError, match=r"token id 39 \('<39>'\); token ids .*embedding. The "
                                         "tokenizer has tokens that the model does not have"):
        check_ids(np.array([39]), 32, "x", known)
    for other in (40, -1):
        with pytest.raises(ValueError, match=f"token id {other}; .*embedding$"):
            check_ids(np.array([other]), 32, "x", known)


@pytest.mark.parametrize(("tokens", "options", "words"), [
    ("ab", {}, "tokens is 'ab'; give a list of rows of token ids"),
    (5, {}, "tokens is 5; give a list of rows"), ([5, 6], {}, "tokens is a single row of ids"),
    ([], {}, "tokens is empty or has an empty row"), ([[5], []], {}, "has an empty row"),
    ([[5], [0.5]], {}, r"row 1 of tokens is \[0.5\]; give integers"),
    ([[5], [[1], [2, 3]]], {}, "row 1 of tokens is"), ([[5]], {"width": 2.0}, "width is 2.0"),
    ([[5]], {"row_id": [0.5]}, r"row_id is \[0.5\]; give one integer per row"),
    ([[5]], {"turn": [["a"]]}, "turn is .*; give one 32-bit integer per token of every row"),
    ([[5]], {"kind": [[2**40]]}, "kind is .*; give one 32-bit integer per token"),
], ids=str)
def test_what_is_no_batch_is_refused_with_the_argument(tokens, options, words):
    """Each message begins with the argument or the row."""
    with pytest.raises(ValueError, match=words):
        batch(tokens, **options)


def test_a_batch_may_be_as_wide_as_its_longest_row():
    """A smaller width is an error."""
    assert batch([[5, 6], [7]], width=2).tokens.tolist() == [[5, 6], [7, 0]]
    with pytest.raises(ValueError, match="width is 1, but a row has 2 tokens; give a larger width"):
        batch([[5, 6]], width=1)


@pytest.mark.parametrize(("key", "value", "good"), [
    ("vocab_size", 2**31 - 1, True), ("vocab_size", 2**31, False), ("hidden_size", True, False),
    ("num_hidden_layers", 1024, True), ("num_hidden_layers", 1025, False),
    ("rms_norm_eps", 1e36, True), ("rms_norm_eps", 1e37, False), ("rms_norm_eps", 1e-37, False),
    ("rms_norm_eps", 1.1e-37, True), ("rms_norm_eps", True, False), ("rope_theta", 0, False),
    ("max_position_embeddings", 2**31, False), ("head_dim", 2.0, False),
    ("max_window_layers", -1, False), ("max_window_layers", 0, True), ("mlp_bias", 1, False),
    ("hidden_act", 5, False), ("rope_scaling", [], False), ("hidden_act", "swish", True),
], ids=str)
def test_a_field_has_a_type_and_a_range(key, value, good):
    """Values on both sides of each bound."""
    raw = {**BASE, key: value}
    if good:
        from_hf(raw)
    else:
        with pytest.raises(ValueError, match=re.escape(f"{key} is {value!r};")):
            from_hf(raw)


def test_fields_that_a_file_may_omit_have_the_values_of_transformers():
    """Also with a null, and with the model type instead of the architecture."""
    few = {key: BASE[key] for key in list(BASE)[:5] + ["intermediate_size"]}
    config = from_hf(few)
    assert (config.n_kv_heads, config.head_dim, config.norm_eps, config.max_context) == (
        2, 4, 1e-6, 2048)
    assert (config.rope, config.attn_scale, config.activation) == (Rope(10_000.0), 0.5, "silu")
    assert not config.tied_embeddings and config.windows == (None,)
    named = {**few, "num_key_value_heads": None, "model_type": "llama", "architectures": None}
    assert from_hf(named) == config
    qwen = from_hf({**few, "architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 1})
    assert (qwen.head_dim, qwen.qk_norm, qwen.qkv_bias, qwen.windows) == (128, True, False, (None,))
    old = from_hf({**few, "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 1})
    assert (old.qkv_bias, old.o_bias, old.qk_norm) == (True, False, False)


@pytest.mark.parametrize(("fields", "there", "absent"), [
    ({"family": "llama", "qk_norm": False, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
     {"attention_bias": True, "mlp_bias": True, "hidden_act": "silu"}, ("layer_types",)),
    ({"family": "mistral", "qk_norm": False, "windows": (8, 8, 8)},
     {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3}, ("attention_bias",
                                                                    "use_sliding_window")),
    ({"family": "qwen2", "qk_norm": False, "qkv_bias": True, "windows": (None, None, 8)},
     {"sliding_window": 8, "use_sliding_window": True,
      "layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, ("attention_bias",)),
    ({"windows": (None,) * 3}, {"sliding_window": None, "use_sliding_window": False,
                                "attention_bias": False}, ("mlp_bias",)),
    ({"family": "gemma3", "activation": "gelu_tanh", "norm_offset": 1.0, "post_norms": True,
      "embed_scale": math.sqrt(32), "attn_scale": 144**-0.5, "rope_local": Rope(5.0),
      "final_softcap": 30.0, "windows": (8, None, 8), "tied_embeddings": True},
     {"query_pre_attn_scalar": 144, "hidden_activation": "gelu_pytorch_tanh",
      "final_logit_softcapping": 30.0, "attn_logit_softcapping": None}, ("hidden_act",)),
    ({"rope": Rope(7.0, "llama3", 8.0, 1.0, 4.0, 99)}, {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 7.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 99}}, ()),
    ({"rope": Rope(7.0, "linear", 8.0)}, {"rope_parameters": {
        "rope_type": "linear", "rope_theta": 7.0, "factor": 8.0}}, ()),
], ids=["llama", "mistral", "qwen2", "qwen3", "gemma3", "llama 3 scaling", "linear scaling"])
def test_a_configuration_is_written_with_the_keys_of_its_family(fields, there, absent):
    """And is read back as the same configuration."""
    config = s.tiny_config(**fields)
    raw = to_hf(config)
    assert {key: raw[key] for key in there} == there and not set(absent) & set(raw)
    assert from_hf(raw) == config


def test_a_scale_that_is_no_integer_power_is_written_as_it_is():
    """Integers are written as integers, because transformers requires them."""
    config = s.tiny_config(family="gemma2", qk_norm=False, activation="gelu_tanh", norm_offset=1.0,
                           post_norms=True, embed_scale=math.sqrt(32), attn_scale=2.5**-0.5,
                           attn_softcap=50.0, tied_embeddings=True)
    assert to_hf(config)["query_pre_attn_scalar"] == pytest.approx(2.5)


def test_the_quantization_is_noted_with_its_tables():
    """Scales per channel and in blocks may occur together."""
    params = s.random_params(s.tiny_config())
    assert scheme(params) == "" and weights_note(params) == {}
    assert weights_note(in_int8(params)) == {"weights": "int8 per channel"}
    made = in_int8(params, tables=False)
    assert weights_note(made) == {"weights": "int8 per channel, float tables"}
    wide = made.layers[0].w_up_fd
    layer = made.layers[0].replace(w_up_fd=wide.replace(scale=jnp.ones((48, 2))))
    assert scheme(made.replace(layers=(layer, *made.layers[1:]))) == (
        "int8 per channel and in blocks, float tables")


def test_the_layout_of_an_int8_model_has_a_scale_per_output_channel():
    """Norms keep their form, and a tied head stays tied."""
    config = s.tiny_config()
    plain, made = layout(config), int8_layout(config)
    whole = made.layers[0].wo_dnh
    assert whole.value == dataclasses.replace(plain.layers[0].wo_dnh, dtype="int8")
    assert whole.scale == Spec((32,), ("embed",), dtype="float32") and whole.inner == 2
    assert made.layers[0].wq_nhd.scale == Spec((4, 12), ("heads", None), dtype="float32")
    assert made.embed_vd.scale.shape == made.head_vd.scale.shape == (97,)
    assert made.final_norm_d == plain.final_norm_d and made.layers[2].q_norm_h.shape == (12,)
    floats = int8_layout(config, tables=False)
    assert (floats.embed_vd, floats.head_vd) == (plain.embed_vd, plain.head_vd)
    assert int8_layout(s.tiny_config(tied_embeddings=True)).head_vd is None


def test_the_origin_of_a_direction_is_the_hash_of_the_weights():
    """The last eight digits of the fingerprint, and 0 without a fingerprint."""
    assert origin("01234567" + "0000002a") == 42 and origin("") == 0
    assert origin("ffffffff" + "ffffffff") == 2**32 - 1


def test_a_model_is_asked_for_by_its_attributes():
    """A name, or parameters alone, are no model."""
    check_model(s.tiny_model())
    for wrong in ("mini", s.tiny_model().params, types.SimpleNamespace(params=1)):
        with pytest.raises(ValueError, match=r"^model is .*; give the result of jp.load\(…\)$"):
            check_model(wrong)


def test_initial_weights_are_drawn_alike_in_every_dtype():
    """Drawn in float32 and then rounded; norms are the identity."""
    config = s.tiny_config(norm_offset=1.0, n_layers=1, windows=(None,))
    wide, narrow = (jp.init_params(config, jax.random.key(0), dtype) for dtype in (
        "float32", "bfloat16"))
    assert s.same_bits(jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide), narrow)
    assert not np.asarray(wide.final_norm_d).any()  # the offset adds 1
    assert float(jnp.std(wide.embed_vd)) == pytest.approx(0.02, rel=0.05)
    assert isinstance(config, ModelConfig)
