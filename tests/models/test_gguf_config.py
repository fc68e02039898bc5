"""The configuration of a GGUF model, from its metadata and the shapes of its tensors."""

from __future__ import annotations

import warnings

import gguf_files
import hf
import numpy as np
import pytest
from jaxpersona.ckpts import gguf_config

import jaxpersona as jp
from jaxpersona.errors import UserError
from jaxpersona.models.config import Rope

SIZES = {"block_count": 2, "context_length": 64, "embedding_length": 8, "feed_forward_length": 16,
         "attention.head_count": 2}
SHAPES = {"token_embd.weight": (32, 8), "output.weight": (32, 8)}


def converted(architecture="llama", fields=(), shapes=SHAPES, divisors=None, **general):
    """Convert a model of two layers with two heads of dimension 4; fields override the sizes."""
    own = {f"{architecture}.{key}": value for key, value in {**SIZES, **dict(fields)}.items()}
    general = {f"general.{key}": value for key, value in general.items()}
    return gguf_config.to_config({"general.architecture": architecture, **general, **own}, shapes,
                                 divisors, "model.gguf")


def test_fields_that_a_file_may_omit_have_the_values_of_llama_cpp():
    config = converted()
    assert (config.vocab_size, config.d_model, config.n_layers, config.d_ff) == (32, 8, 2, 16)
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (2, 2, 4)
    assert (config.norm_eps, config.rope, config.attn_scale) == (1e-6, Rope(10_000.0), 0.5)
    assert config.max_context == 64 and not config.tied_embeddings
    config = converted(fields={
        "attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 16,
        "attention.head_count_kv": 1, "rope.freq_base": 5e5,
        "attention.layer_norm_rms_epsilon": float(np.float32(1e-5))},  # a float32 in the file
        shapes={"token_embd.weight": (32, 8)})
    assert (config.n_kv_heads, config.head_dim, config.attn_scale) == (1, 16, 0.25)
    assert (config.norm_eps, config.rope, config.tied_embeddings) == (1e-5, Rope(5e5), True)


@pytest.mark.parametrize(("fields", "rope"), [
    ({}, Rope()), ({"rope.scale_linear": 4.0}, Rope(kind="linear", factor=4.0)),
    ({"rope.scale_linear": 1.0}, Rope()),
    ({"rope.scaling.factor": 4.0}, Rope(kind="linear", factor=4.0)),
    ({"rope.scaling.factor": 4.0, "rope.scaling.type": "linear"}, Rope(kind="linear", factor=4.0)),
    ({"rope.scaling.factor": 4.0, "rope.scaling.type": "none"}, Rope()),
], ids=str)
def test_a_linear_scaling_may_have_its_older_key(fields, rope):
    assert converted(fields=fields).rope == rope


def test_divisors_of_one_are_no_scaling():
    assert converted(divisors=np.ones(2, np.float32)).rope == Rope()


@pytest.mark.parametrize(("fields", "general", "family", "windows"), [
    ({}, {"name": "Mistral 7B Instruct"}, "mistral", (None, None)),
    ({}, {"basename": "mistral-nemo"}, "mistral", (None, None)),
    ({"attention.sliding_window": 16}, {"name": "Zephyr"}, "mistral", (16, 16)),
    ({}, {"name": "Hermes"}, "llama", (None, None)),
], ids=str)
def test_a_mistral_is_known_by_its_name_or_its_window(fields, general, family, windows):
    config = converted(fields=fields, **general)
    assert (config.family, config.windows) == (family, windows)


@pytest.mark.parametrize(("architecture", "fields", "windows"), [
    ("gemma2", {}, (4096, None, 4096)),  # llama.cpp's default
    ("gemma2", {"sliding_window": 9}, (9, None, 9)),
    ("gemma3", {}, (None, None, None)),
    ("gemma3", {"sliding_window": 9, "sliding_window_pattern": 2}, (9, None, 9)),
    ("gemma3", {"sliding_window": 9, "sliding_window_pattern": np.array([False, True, True])},
     (None, 9, 9)),
    ("qwen3", {"sliding_window": 9, "sliding_window_pattern": np.array([False, True, False])},
     (None, 9, None)),
    ("qwen2", {"sliding_window": 9, "sliding_window_pattern": np.zeros(3, bool)},
     (None, None, None)),
    ("qwen2", {}, (None, None, None)),
], ids=str)
def test_layers_have_the_windows_that_a_file_states(architecture, fields, windows):
    fields = {f"attention.{key}": value for key, value in fields.items()}
    assert converted(architecture, {"block_count": 3, **fields}).windows == windows


@pytest.mark.parametrize(("architecture", "fields", "scale"), [
    ("gemma2", {"attention.scale": 0.125}, 0.125),
    ("gemma3", {"attention.scale": 0.125}, 0.125),
    ("gemma2", {"block_count": 46}, 8**-0.5),  # the width divided by the number of heads
    ("gemma3", {"block_count": 62}, 8**-0.5),
    ("gemma2", {"block_count": 62}, 0.25), ("gemma3", {"block_count": 46}, 0.25),
], ids=str)
def test_gemma_s_scale_is_the_file_s_or_that_of_its_depth(architecture, fields, scale):
    config = converted(architecture, {"embedding_length": 16, "attention.key_length": 16, **fields})
    assert config.attn_scale == pytest.approx(scale)


def test_gemma_s_soft_caps_and_local_base_are_those_of_the_file():
    assert [getattr(converted("gemma2"), f"{name}_softcap") for name in ("attn", "final")] == [
        50.0, 30.0]
    config = converted("gemma2", {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 0.0})
    assert (config.attn_softcap, config.final_softcap) == (20.0, None)
    assert converted("gemma3").rope_local == Rope(10_000.0)
    config = converted("gemma3", {"rope.freq_base": 1e6, "rope.freq_base_swa": 5000.0})
    assert (config.rope, config.rope_local) == (Rope(1e6), Rope(5000.0))


def test_biases_are_those_of_the_tensors():
    bias = {"blk.0.attn_q.bias": (8,)}
    for architecture in ("llama", "qwen3", "gemma2", "gemma3"):
        plain, biased = (converted(architecture, shapes={**SHAPES, **more}) for more in ({}, bias))
        assert not plain.qkv_bias and not plain.o_bias and biased.qkv_bias and biased.o_bias
    config = converted(shapes={**SHAPES, "blk.0.ffn_gate.bias": (16,)})
    assert config.mlp_bias and not config.qkv_bias


@pytest.mark.parametrize(("fields", "options", "words"), [
    ({}, {"shapes": {}}, "^tensor token_embd.weight is missing$"),
    ({}, {"shapes": {"token_embd.weight": (32,)}}, r"token_embd.weight has shape \[32\]; it must"),
    ({"attention.value_length": 8}, {}, "value_length is 8; it must equal the head dimension .4."),
    ({"rope.freq_base": 0.5}, {}, "freq_base is 0.5"), ({"logit_scale": 0.5}, {}, "logit_scale is"),
    ({"attention.causal": False}, {}, "attention.causal is False"),
    ({"use_parallel_residual": True}, {}, "use_parallel_residual is True"),
    ({"context_length": 2**31}, {}, "context_length is 2147483648; it must be a positive"),
    ({"rope.scaling.factor": 4.0}, {"divisors": np.ones(2)}, "both rope_freqs.weight and rope.sc"),
    ({}, {"divisors": np.ones(3)}, "rope_freqs.weight must contain 2 positive numbers"),
    ({}, {"divisors": np.array([1.0, -8.0])}, "rope_freqs.weight must contain 2 positive numbers"),
    ({"attention.sliding_window": 9}, {"architecture": "qwen2"}, "the layers with a window are"),
    ({"attention.sliding_window": 9, "attention.sliding_window_pattern": np.ones(3, bool)},
     {"architecture": "qwen2"}, "has length 3; it must have one entry per layer .2."),
], ids=str)
def test_a_field_that_is_not_supported_is_named(fields, options, words):
    with pytest.raises(UserError, match=words):
        converted(fields=fields, **options)


def test_unknown_fields_are_ignored_with_one_warning():
    """Fields of other prefixes, and known fields with a neutral value, are not named."""
    with pytest.warns(UserWarning, match=r"^model.gguf: ignored unknown fields \['llama.beta'\]$"):
        config = converted(fields={"beta": 1, "expert_count": 0, "logit_scale": 1.0}, license="mit")
    with warnings.catch_warnings(action="error"):
        assert config == converted()


def test_settings_for_sampling_that_generate_does_not_support_are_named_once():
    """`temp` and `top_p` are arguments of `generate`; the others may be turned off by a value."""
    fields = {"temp": 0.6, "top_p": 0.95, "top_k": 40, "min_p": float(np.float32(0.05)),
              "xtc_probability": 0.5, "xtc_threshold": 0.1, "penalty_repeat": 1.1000000238418579,
              "penalty_last_n": 64, "mirostat": 2, "mirostat_tau": 5.0}
    with pytest.warns(UserWarning, match="m.gguf: ignored top_k=40, min_p=0.05, xtc_probability="
                                         "0.5, penalty_repeat=1.1, mirostat=2, which") as caught:
        gguf_config.warn_sampling({f"general.sampling.{k}": v for k, v in fields.items()}, "m.gguf")
    assert len(caught) == 1
    off = {"top_k": 0, "min_p": 0.0, "xtc_probability": -1.0, "penalty_repeat": 1.0, "mirostat": 0}
    for neutral in ({}, off, {"top_k": -1}):  # warnings are errors in this test suite
        gguf_config.warn_sampling({f"general.sampling.{k}": v for k, v in neutral.items()}, "m")
    with pytest.warns(UserWarning, match=r"ignored top_k=array\(\[1, 2\]\), which"):
        gguf_config.warn_sampling({"general.sampling.top_k": np.array([1, 2])}, "m")


def test_load_names_such_settings_with_the_file(tmp_path):
    pytest.importorskip("gguf")
    path = gguf_files.write(tmp_path / "m.gguf", hf.model("qwen3", num_hidden_layers=1), fields={
        "general.sampling.top_k": 20, "general.sampling.temp": 0.5})
    with pytest.warns(UserWarning, match=f"{path}: ignored top_k=20, which generate") as caught:
        jp.load(path)
    assert len(caught) == 1
