"""Int8 weights: products, models, gradients, meshes, fingerprints and files."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from jaxpersona.ckpts import adapter, hf, names, orbax
from jaxpersona.ckpts.quantize import Form, parse_form
from safetensors.numpy import save_file

import jaxpersona as jp
from jaxpersona.distributed.sharding import make_mesh
from jaxpersona.engine.generate import generate
from jaxpersona.models import int8, prepared
from jaxpersona.models.batch import batch
from jaxpersona.models.forward import forward
from jaxpersona.models.int8 import Int8, dequantized
from jaxpersona.models.model import Model
from jaxpersona.models.params import fingerprint
from jaxpersona.models.weight import LowRank, dot
from jaxpersona.vectors.vector import Vector

pytestmark = pytest.mark.usefixtures("compile_fast")

CONFIG = s.tiny_config(vocab_size=96, tied_embeddings=True)  # a mesh divides the vocabulary
PARAMS = s.random_params(CONFIG)
ROWS = batch([[5, 6, 7, 8, 9, 4, 3, 2]] * 4)
F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
MESHES = {"tensor": dict(model=4, data=2), "group": dict(model=2, fsdp=2)}


def is_int8(x):
    return isinstance(x, Int8)


def dense(params):
    """The float parameters that int8 ones stand for."""
    return jax.tree.map(lambda x: dequantized(x) if is_int8(x) else x, params, is_leaf=is_int8)


def matrices(params):
    return [x for x in jax.tree.leaves(params, is_leaf=is_int8) if is_int8(x)]


@pytest.fixture(scope="module")
def small():
    return prepared.in_int8(PARAMS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("float") / "model"
    hf.save(path, PARAMS, CONFIG)
    return path


def blocks(w, width):
    """A weight [O, I] with a float16 scale per block of `width` inputs, as GGUF's Q8_0 has."""
    parts = w.reshape(w.shape[0], -1, width)
    scale = (np.abs(parts).max(-1) / 127).astype(np.float16)
    value = np.round(parts / scale[..., None].astype(np.float32)).reshape(w.shape)
    return Int8(jnp.asarray(value, jnp.int8), jnp.asarray(scale))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("blocked", [False, True], ids=["channels", "blocks"])
@pytest.mark.parametrize("channels", [8, 40, 43])
def test_a_product_in_pieces_is_that_of_the_dequantized_weight(monkeypatch, rows, blocked,
                                                               channels):
    """Pieces of 8 channels; 43 channels are no multiple, so that the last piece overlaps."""
    monkeypatch.setattr(int8, "_PIECE", 8 * 4 * 64)
    rng = np.random.default_rng(channels)
    w, x = (rng.normal(size=(n, 64)).astype(np.float32) for n in (channels, rows))
    made = blocks(w, 32) if blocked else int8.quantized(jnp.asarray(w))
    scale = np.repeat(np.asarray(made.scale, np.float64).reshape(channels, -1),
                      64 // (2 if blocked else 1), 1)
    exact = np.asarray(made.value) * scale
    step = np.abs(w).max(1, keepdims=True) / 127
    assert (np.abs(exact - w) <= step * 0.51).all()
    np.testing.assert_allclose(dequantized(made), exact, rtol=1e-6)
    want = x.astype(np.float64) @ exact.T
    got = jax.jit(dot)(jnp.asarray(x), made)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    narrow = jax.jit(dot)(jnp.asarray(x, jnp.bfloat16), made)
    assert narrow.dtype == jnp.bfloat16 and s.relative(narrow, want).max() < 0.02


FAMILIES = {
    "llama": dict(family="llama", qk_norm=False),
    "qwen2": dict(family="qwen2", qk_norm=False, qkv_bias=True),
    "qwen3": dict(tied_embeddings=True),
    "gemma2": dict(family="gemma2", qk_norm=False, tied_embeddings=True, norm_offset=1.0,
                   post_norms=True, embed_scale=32**0.5, attn_softcap=50.0, final_softcap=30.0,
                   activation="gelu_tanh", windows=(4, None, 4)),
}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name == "llama" else name for name in FAMILIES])
def test_a_model_computes_what_the_dequantized_one_does(name):
    model = s.tiny_model(**FAMILIES[name])
    made = prepared.in_int8(model.params)
    count = 7 * model.config.n_layers + (1 if model.config.tied_embeddings else 2)
    assert len(matrices(made)) == count and int8.scheme(made) == "int8 per channel"
    caps = jp.cap(np.ones(model.config.d_model), layers=[1, 2], floor=-1e9)
    wanted, got = (s.run(p, model.config, ROWS, capture=s.READ) for p in (dense(made), made))
    assert s.relative(got.logits, wanted.logits).max() < 1e-4
    assert s.relative(got.captured["full"].value, wanted.captured["full"].value).max() < 1e-4
    plain = s.run(model.params, model.config, ROWS).logits
    assert 1e-4 < s.relative(got.logits, plain).max() < 0.1  # quantized, and close
    capped = s.run(made, model.config, ROWS, interventions=caps, capture=s.READ)
    assert s.same_bits(capped.logits, got.logits)  # a cap that never binds
    assert capped.applied[0].seen.sum() and not capped.applied[0].changed.sum()


def test_float_tables_stay_as_they_are(small):
    made = prepared.in_int8(PARAMS, tables=False)
    assert made.embed_vd is PARAMS.embed_vd and made.head_vd is None
    assert int8.scheme(made) == "int8 per channel, float tables"
    assert s.same_bits(made.layers, small.layers)
    assert small.like.dtype == made.like.dtype == jnp.float32


@pytest.mark.parametrize(("arguments", "form"), [
    ((None, None, None), Form(F32)), (("float32", None, None), Form(F32, given=True)),
    ((jnp.float16, None, None), Form(F16, given=True)),
    (("int8", None, None), Form(F32, True, None, True)),
    ((np.int8, "float16", "int8"), Form(F16, True, True, True)),
    ((jnp.int8, jnp.float16, "float"), Form(F16, True, False, True)),
], ids=str)
def test_arguments_of_load_are_a_form(arguments, form):
    assert parse_form(*arguments, F32) == form


@pytest.mark.parametrize("tables", ["float", "int8"])
def test_the_tables_of_a_folder_are_the_embedding_and_an_untied_head(tmp_path, tables):
    config = dataclasses.replace(CONFIG, tied_embeddings=False)
    hf.save(tmp_path, s.random_params(config), config)
    params = jp.load(tmp_path, dtype="int8", tables=tables).params
    assert is_int8(params.embed_vd) == is_int8(params.head_vd) == (tables == "int8")
    assert is_int8(params.layers[0].wq_nhd)


def test_generation_and_a_cap_that_binds_are_those_of_the_dequantized_model(small):
    mark = fingerprint(CONFIG, PARAMS)
    model = Model(CONFIG, small, None, None, "m", mark, (), False)
    cap = jp.cap(Vector(np.ones((3, 32), np.float32), "d", fingerprint=mark), layers=[1], floor=2.0)
    prompts = s.prompts((5, 9, 3), 96)
    found = generate(model, prompts, interventions=cap, max_new_tokens=6, batch_size=4)
    whole = [[*prompt, *reply.tolist()]
             for prompt, reply in zip(prompts, found.tokens, strict=True)]
    out = s.run(dense(small), CONFIG, batch(whole), interventions=cap)
    for row, prompt in enumerate(prompts):
        wanted = np.asarray(out.logits)[row, len(prompt) - 1 : len(whole[row]) - 1].argmax(-1)
        assert wanted.tolist() == found.tokens[row].tolist()
    assert found.applied[0].changed.sum() > 0


def test_a_decode_holds_no_float_copy_of_a_weight():
    """Temporaries of a step stay below one weight in float32; its program has no such array."""
    config = s.tiny_config(d_model=128, d_ff=8192, n_layers=2, vocab_size=16_384)
    made = prepared.in_int8(s.random_params(config))
    step, start = batch([[5]]), jp.Carry(cache=jp.init_cache(config, 1, 16))

    @jax.jit
    def decode(params, carry):  # a loop: XLA must not convert the weights before it either
        def one(_, held):
            out = forward(params, config, step, carry=held[0], logits="last")
            return out.carry, out.logits

        first = forward(params, config, step, carry=carry, logits="last")
        return jax.lax.fori_loop(0, 3, one, (first.carry, first.logits))

    program = decode.lower(made, start).compile()
    weight = 4 * 8192 * 128
    assert program.memory_analysis().temp_size_in_bytes < 1.5 * weight
    text = program.as_text()
    assert "s8[8192,128]" in text and "f32[8192,128]" not in text
    assert "f32[16384,128]" not in text and "f32[128,8192]" not in text


def test_gradients_pass_through_int8_to_lora_factors_and_directions(monkeypatch, small):
    monkeypatch.setattr(int8, "_PIECE", 8 * 4 * 32)
    rng = np.random.default_rng(3)
    pairs = {t.name: adapter.Pair(rng.normal(size=(2, t.shape[1])).astype(np.float32),
                                  rng.normal(size=(t.shape[0], 2)).astype(np.float32) * 0.1)
             for t in jax.tree.leaves(names.tensors(CONFIG)) if "q_proj" in t.name
             or "down_proj" in t.name}

    def gradient(params):
        params = adapter.attached(params, CONFIG, pairs)

        def loss(factors, direction):
            layers = tuple(layer.replace(
                wq_nhd=layer.wq_nhd.replace(a=a, b=b)) for layer, (a, b)
                in zip(params.layers, factors, strict=True))
            edits = jp.steer(direction[None], layers=[1])
            logits = forward(params.replace(layers=layers), CONFIG, ROWS,
                             interventions=edits).logits
            return jax.nn.log_softmax(logits)[..., 5].mean()

        factors = [(layer.wq_nhd.a, layer.wq_nhd.b) for layer in params.layers]
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(factors, jnp.full((1, 32), 0.1))

    got, want = gradient(small), gradient(dense(small))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(other).max() > 0
        assert np.abs(one - other).max() < 1e-4 * np.abs(other).max()


def test_a_gradient_keeps_no_float_copy_of_a_weight(monkeypatch):
    monkeypatch.setattr(int8, "_PIECE", 8 * 4 * 512)
    held = int8.quantized(jax.random.normal(jax.random.key(0), (512, 512)))

    def loss(x, ws):
        for w in ws:
            x = jnp.tanh(dot(x, w))
        return x.sum()

    step = jax.jit(jax.grad(loss)).lower(jnp.ones((4, 512)), [held] * 3).compile()
    assert step.memory_analysis().temp_size_in_bytes < 4 * 512 * 512


@pytest.mark.parametrize("kind", MESHES)
def test_a_mesh_gives_the_weights_the_logits_and_the_fingerprint_of_one_device(folder, small, kind):
    axes = MESHES[kind]
    size = int(np.prod(list(axes.values())))
    model = jp.load(folder, dtype="int8", mesh=make_mesh(**axes, devices=jax.devices()[:size]))
    assert s.differing(model.params, small) == []
    assert model.fingerprint == fingerprint(CONFIG, PARAMS) == fingerprint(CONFIG, model.params)
    layer = model.params.layers[0]
    for w in (layer.wq_nhd, layer.w_gate_fd, layer.w_down_df):  # scales follow the channels
        assert tuple(w.scale.sharding.spec) == tuple(w.value.sharding.spec)[: w.scale.ndim]
    edits = jp.cap(np.ones(32), layers=[1], floor=1.0)
    got = s.run(model.params, CONFIG, ROWS, interventions=edits)
    want = s.run(small, CONFIG, ROWS, interventions=edits)
    assert s.relative(jax.device_get(got.logits), want.logits).max() < 1e-5
    assert got.applied[0].changed.sum() == want.applied[0].changed.sum() > 0


def test_an_int8_model_has_the_fingerprint_of_its_float_weights(folder, small):
    seen = []
    plain, model = jp.load(folder), jp.load(folder, dtype="int8", activations="bfloat16",
                                            progress=lambda *at: seen.append(at))
    assert model.fingerprint == plain.fingerprint
    assert seen[-1] == (CONFIG.bytes(4),) * 2 and len(seen) == len(jax.tree.leaves(PARAMS))
    assert seen[0] == (96 * 32 * 4, CONFIG.bytes(4))
    assert "int8 per channel, bfloat16" in repr(model) and len(repr(model)) <= 120
    assert model.params.final_norm_d.dtype == jnp.bfloat16
    assert s.same_bits([w.value for w in matrices(model.params)],
                       [w.value for w in matrices(small)])
    copy = dataclasses.replace(model, params=model.params)
    assert copy.fingerprint == plain.fingerprint
    first = small.layers[0]
    value = first.wo_dnh.value.at[0, 0, 0].add(np.int8(1))
    for wo in (first.wo_dnh.replace(value=value),
               first.wo_dnh.replace(scale=first.wo_dnh.scale.at[0].multiply(2)),
               first.wo_dnh.replace(made_from=None)):
        changed = small.replace(layers=(first.replace(wo_dnh=wo), *small.layers[1:]))
        assert fingerprint(CONFIG, changed) != plain.fingerprint
    texts = dict(positive=[[5, 6, 7], [9, 8]], negative=[[4, 3, 2], [8, 9, 7]])
    vector = jp.contrast(model, **texts, pool="last")
    assert vector.fingerprint == plain.fingerprint
    assert vector.notes["weights"] == "int8 per channel"
    assert "weights" not in jp.contrast(plain, **texts, pool="last").notes


@pytest.mark.filterwarnings("ignore:.*has no weights for")
def test_an_adapter_is_merged_before_the_quantization_or_kept_apart(folder, tmp_path):
    rng = np.random.default_rng(0)
    base = "base_model.model.model.layers.1.mlp.up_proj"
    save_file({f"{base}.lora_A.weight": rng.normal(size=(2, 32)).astype(np.float32),
               f"{base}.lora_B.weight": rng.normal(size=(48, 2)).astype(np.float32)},
              tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}))
    for merge in (True, False):
        plain, model = (jp.load(folder, dtype=dtype, adapter=tmp_path, merge=merge)
                        for dtype in ("float32", "int8"))
        assert model.fingerprint == plain.fingerprint
        w = model.params.layers[1].w_up_fd
        assert isinstance(w, Int8 if merge else LowRank)
        wanted, got = (s.run(p, CONFIG, ROWS).logits for p in (plain.params, model.params))
        assert 1e-4 < s.relative(got, wanted).max() < 0.1
        if merge:  # also if the float weights are those of an Orbax folder
            orbax.save(tmp_path / "f", PARAMS, CONFIG)
            found = jp.load(tmp_path / "f", dtype="int8", adapter=tmp_path)
            assert s.differing(found.params, model.params) == []


@pytest.mark.parametrize("tables", [True, False])
def test_orbax_stores_int8_weights(folder, tmp_path, tables):
    made = prepared.in_int8(PARAMS, tables=tables)
    orbax.save(tmp_path / "m", made, CONFIG)
    model = jp.load(tmp_path / "m")
    assert s.differing(model.params, made) == []
    assert model.fingerprint == fingerprint(CONFIG, PARAMS)
    if not tables:
        with pytest.raises(jp.UserError, match="stored as int8 per channel, float tables, which"):
            jp.load(tmp_path / "m", dtype="int8", tables="int8")
        narrow = jp.load(tmp_path / "m", dtype="int8", tables="float", activations="bfloat16")
        assert {narrow.params.final_norm_d.dtype, narrow.params.embed_vd.dtype} == {
            jnp.dtype("bfloat16")}
        assert s.same_bits(matrices(narrow.params)[0].value, matrices(made)[0].value)
        return
    mesh = make_mesh(2, 2, devices=jax.devices()[:4])
    assert s.differing(jp.load(tmp_path / "m", mesh=mesh).params, made) == []
    for options in ({"dtype": "float32"}, {"dtype": "int8", "tables": "float"}):
        with pytest.raises(jp.UserError, match="stored as int8 per channel, which can be neither"):
            jp.load(tmp_path / "m", **options)
    orbax.save(tmp_path / "f", PARAMS, CONFIG)
    assert s.differing(jp.load(tmp_path / "f", dtype="int8").params, made) == []
    with pytest.raises(jp.UserError, match="use ckpts.orbax.save, or load the model in float32"):
        hf.save(tmp_path / "h", made, CONFIG)


def test_random_weights_may_be_int8():
    plain, model = (jp.load("random:qwen3-mini", dtype=d) for d in ("float32", "int8"))
    assert model.fingerprint == plain.fingerprint
    held, whole = (sum(x.nbytes for x in jax.tree.leaves(m.params)) for m in (model, plain))
    assert held < 0.3 * whole
