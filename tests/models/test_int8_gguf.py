"""GGUF models in int8: blocks of type Q8_0 are kept, other types are quantized per channel."""

from __future__ import annotations

import functools
import json

import gguf_files
import hf
import jax
import numpy as np
import pytest
import support as s
from jaxpersona.ckpts import gguf_model, orbax
from jaxpersona.ckpts.loading import load
from safetensors.numpy import save_file

from jaxpersona.distributed.sharding import make_mesh
from jaxpersona.models import int8
from jaxpersona.models.batch import batch
from jaxpersona.models.int8 import Int8, dequantized

gguf = pytest.importorskip("gguf")
ROWS = batch([[5, 6, 7, 8, 9, 4, 3, 2]] * 4)
Q8 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A Llama, whose rows of Q and K the file holds in another order, with Q8_0 matrices."""
    made = hf.model("llama", hidden_size=64, num_hidden_layers=2, head_dim=16, vocab_size=96,
                    num_attention_heads=4, num_key_value_heads=2, intermediate_size=96)

    def encode(name, value):
        return (value, None) if "ffn_up" in name else (gguf.quantize(value, Q8), Q8)

    folder = tmp_path_factory.mktemp("gguf")
    return gguf_files.write(folder / "m.gguf", made, encode)


@functools.cache
def loaded(path, dtype):
    return load(path, dtype=dtype)


def test_blocks_are_kept_and_compute_what_the_dequantized_weights_do(path):
    plain, model = loaded(path, "float32"), loaded(path, "int8")
    assert model.fingerprint == plain.fingerprint
    assert int8.scheme(model.params) == "int8 per channel and in blocks"
    for layer, wanted in zip(model.params.layers, plain.params.layers, strict=True):
        for name in ("wq_nhd", "wk_khd", "wo_dnh", "w_down_df"):
            w = getattr(layer, name)
            assert w.blocked and w.scale.dtype == np.float16
            np.testing.assert_array_equal(dequantized(w), getattr(wanted, name))  # bit for bit
        up, error = layer.w_up_fd, dequantized(layer.w_up_fd) - wanted.w_up_fd
        assert not up.blocked and (np.abs(error) <= up.scale[:, None] * 0.501).all()
    dense = jax.tree.map(lambda x: dequantized(x) if isinstance(x, Int8) else x, model.params,
                         is_leaf=lambda x: isinstance(x, Int8))
    np.testing.assert_array_equal(dense.embed_vd, plain.params.embed_vd)
    got, want = (s.run(p, model.config, ROWS, capture=s.READ) for p in (model.params, dense))
    assert s.relative(got.logits, want.logits).max() < 1e-4
    assert s.relative(got.captured["full"].value, want.captured["full"].value).max() < 1e-4


def test_a_mesh_quantizes_blocks_again_per_channel(path):
    plain = loaded(path, "float32")
    model = load(path, dtype="int8", mesh=make_mesh(2, 2, devices=jax.devices()[:4]))
    assert int8.scheme(model.params) == "int8 per channel"
    assert model.fingerprint == plain.fingerprint
    w = model.params.layers[0].wo_dnh
    error = np.asarray(dequantized(w)) - np.asarray(plain.params.layers[0].wo_dnh)
    assert (np.abs(error) <= np.asarray(w.scale)[:, None, None] * 0.501).all()


@pytest.mark.filterwarnings("ignore:.*has no weights for")
def test_a_weight_that_an_adapter_changes_keeps_no_blocks(path, tmp_path):
    """A merged weight is quantized per channel; the others keep the file's blocks."""
    rng = np.random.default_rng(0)
    factors = {"lora_A": rng.normal(size=(2, 64)), "lora_B": rng.normal(size=(64, 2)) * 0.1}
    save_file({f"base_model.model.model.layers.1.self_attn.q_proj.{name}.weight":
               x.astype(np.float32) for name, x in factors.items()},
              tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}))
    plain, model = (load(path, dtype=dtype, adapter=tmp_path) for dtype in ("float32", "int8"))
    w, wanted = (m.params.layers[1].wq_nhd for m in (model, plain))
    assert not w.blocked and model.params.layers[0].wq_nhd.blocked
    error = np.abs(np.asarray(dequantized(w)) - np.asarray(wanted))
    assert (error <= np.asarray(w.scale)[..., None] * 0.501).all()
    assert np.abs(wanted - loaded(path, "float32").params.layers[1].wq_nhd).max() > 0.1
    assert model.fingerprint == plain.fingerprint


def test_orbax_stores_blocks(path, tmp_path):
    model = loaded(path, "int8")
    orbax.save(tmp_path / "m", model.params, model.config)
    assert s.differing(load(tmp_path / "m").params, model.params) == []
    with pytest.raises(ValueError, match="int8 weights with block scales, which are not supported "
                                         "on a mesh"):
        load(tmp_path / "m", mesh=make_mesh(2))


def test_only_matrices_of_type_q8_0_have_blocks(path):
    source = gguf_model.open_checkpoint(path).source
    assert source.blocks("model.norm.weight") is None
    assert source.blocks("model.layers.0.mlp.up_proj.weight") is None
    value, scale = source.blocks("model.layers.0.self_attn.k_proj.weight")
    assert value.shape == (32, 64) and scale.shape == (32, 2)
