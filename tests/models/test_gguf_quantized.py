"""Quantized GGUF models have the parameters of the dequantized ones, in every architecture."""

from __future__ import annotations

import functools

import gguf_files
import hf
import numpy as np
import pytest
from jaxpersona.ckpts import gguf_model, names

import jaxpersona as jp

gguf = pytest.importorskip("gguf")
KINDS = ("Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q4_K", "Q6_K")
WIDTH = 256  # rows of K-quants have whole blocks of 256 values
TIED = ("qwen3", "gemma2", "gemma3")
FLOATS = {"Q4_K": (slice(0, 2), slice(2, 4)), "Q6_K": (slice(208, 210),)}  # scales of a block


def random_blocks(kind, shape):
    """Return random blocks whose float16 scales are small, so that all values are finite."""
    columns, size = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(shape[0])
    blocks = draw.integers(0, 256, (shape[0], shape[1] // columns, size), np.uint8)
    for place in FLOATS[kind.name]:
        scales = draw.uniform(1e-4, 1e-3, blocks.shape[:2]).astype("<f2")
        blocks[..., place] = scales[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def encode(kind, value):
    try:
        return gguf.quantize(value, kind)
    except NotImplementedError:  # the package quantizes no K-quants
        return random_blocks(kind, value.shape)


def in_order(value, heads):
    """Return rows of Q or K in the order of transformers; the file interleaves the halves."""
    split = value.reshape(heads, value.shape[0] // heads // 2, 2, *value.shape[1:])
    return split.swapaxes(1, 2).reshape(value.shape)


@functools.cache
def made_model(family):
    more = {"attention_bias": True} if family == "llama" else {}
    return hf.model(family, seed=5, hidden_size=WIDTH, intermediate_size=WIDTH, head_dim=32,
                    num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=2,
                    vocab_size=64, tie_word_embeddings=family in TIED, **more)


def write(path, made, family, kind):
    """Write a model; return its dequantized matrices by the names of transformers."""
    stored, dense = {}, {}

    def keep(name, value):
        stored[name] = encode(kind, value)
        return stored[name], kind

    gguf_files.write(path, made, keep, name="Mistral 7B" if family == "mistral" else "test")
    config = made.config
    for full, tensor in made.state_dict().items():
        data = stored.get(gguf_files.tensor_name(full, config.model_type))
        tied = full == names.HEAD and config.tie_word_embeddings
        assert (data is None) == (tensor.ndim == 1 or tied), full
        dense[full] = tensor.numpy() if data is None else gguf.dequantize(data, kind)
        if data is not None and family in ("llama", "mistral"):
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            if found := [n for stem, n in heads.items() if f".{stem}." in full]:
                dense[full] = in_order(dense[full], found[0])
    return dense


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", hf.FAMILIES)
def test_a_quantized_model_has_the_dequantized_parameters(family, kind, tmp_path, monkeypatch):
    """Each matrix is read in several blocks: Q and K by heads, the others by 20 rows."""
    monkeypatch.setattr(gguf_model, "_BLOCK", 20 * WIDTH)
    dense = write(tmp_path / "m.gguf", made_model(family), family, gguf.GGMLQuantizationType[kind])
    model = jp.load(tmp_path / "m.gguf", dtype="float32")
    assert (model.params.head_vd is None) == (family in TIED)
    assert (model.params.layers[1].q_norm_h is None) == (family not in ("qwen3", "gemma3"))
    found = names.named(model.params, model.config)
    assert set(found) == set(dense) - ({names.HEAD} if family in TIED else set())
    for name, (tensor, value) in found.items():
        want = dense[name]
        assert np.isfinite(want).all() and np.ptp(want) > 0.1, name
        offset = 2e-7 if family.startswith("gemma") and name.endswith("norm.weight") else 0
        np.testing.assert_allclose(np.reshape(value, tensor.shape), want, rtol=0, atol=offset,
                                   err_msg=name)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_matrix_of_two_million_values_is_read_in_blocks(kind, tmp_path):
    """At the block size of the package, with rows in both orders, whole and in slices."""
    made = hf.model("llama", hidden_size=1056, num_hidden_layers=1, head_dim=96, vocab_size=32,
                    num_attention_heads=22, num_key_value_heads=22, intermediate_size=2112)
    kind = gguf.GGMLQuantizationType[kind]
    assert 22 * 96 * 1056 > 2 * gguf_model._BLOCK and gguf_model._BLOCK % (96 * 1056)
    dense = write(tmp_path / "m.gguf", made, "llama", kind)
    source = gguf_model.open_checkpoint(tmp_path / "m.gguf").source
    for stem in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"):
        name = f"model.layers.0.{stem}.weight"
        np.testing.assert_array_equal(source.read(name, None, None), dense[name])
        for rows in ((0, 1056), (1000, 2112), (1023, 1025), (7, 2101)):
            index = (slice(*rows), slice(100, 1000))
            np.testing.assert_array_equal(source.read(name, index, None), dense[name][index])
