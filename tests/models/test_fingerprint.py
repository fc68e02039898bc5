"""A fingerprint covers every value, is equal on every mesh, and records its scheme."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import support as s
from jax.sharding import AxisType, Mesh
from jaxpersona.ckpts import files, hf
from jaxpersona.ckpts.loading import load
from jaxpersona.ckpts.vectors import load_caps, load_vector, save_vector

import jaxpersona as jp
from jaxpersona.distributed import sharding
from jaxpersona.models.config import ModelConfig, Rope
from jaxpersona.models.model import Model
from jaxpersona.models.params import SCHEME, abstract_params, fingerprint, layout, origin
from jaxpersona.vectors.caps import Caps, fitted
from jaxpersona.vectors.vector import Axis, Vector

SHAPE = dict(vocab_size=96, n_layers=2, n_heads=8, n_kv_heads=2, qkv_bias=True,
             o_bias=True)
MESHES = ({"data": 8}, {"data": 2, "model": 4}, {"model": 8}, {"fsdp": 8}, {"fsdp": 4, "model": 2})
RNG = np.random.default_rng(0)


@functools.cache
def arrays():
    model = s.tiny_model(**SHAPE)
    return model.config, jax.device_get(model.params)


def mark(params):
    return fingerprint(arrays()[0], jax.tree.map(jnp.asarray, params))


QUICK = [({"data": 2, "model": 4}, False), ({"fsdp": 4, "model": 2}, True)]


@pytest.mark.parametrize(("axes", "auto"), [
    *QUICK, *(pytest.param(axes, auto, marks=pytest.mark.slow) for axes in MESHES
              for auto in (False, True) if (axes, auto) not in QUICK)], ids=str)
def test_it_is_equal_on_every_mesh_in_float32_and_bfloat16(axes, auto):
    config, params = arrays()
    mesh = sharding.make_mesh(**axes)
    if auto:
        mesh = Mesh(mesh.devices, mesh.axis_names,
                    axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    mesh = sharding.fit(mesh, config)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        placed = jax.tree.map(
            lambda x, spec, dtype=dtype: jax.device_put(
                x.astype(dtype), sharding.weight_sharding(spec.axes, spec.shape, mesh)),
            params, layout(config))
        assert fingerprint(config, placed) == s.tiny_model(**SHAPE).fingerprint


def test_any_single_number_changes_it():
    """Change values at 200 random places, in all arrays, by the smallest step in bfloat16."""
    _, params = arrays()
    leaves, tree = jax.tree.flatten(params)
    before, seen = mark(params), {}
    for turn in range(200):
        which = turn % len(leaves)
        changed = np.array(leaves[which], ml_dtypes.bfloat16)
        place = int(RNG.integers(changed.size))
        changed.reshape(-1).view(np.uint16)[place] ^= 1
        after = mark(tree.unflatten([*leaves[:which], changed.astype(np.float32),
                                     *leaves[which + 1:]]))
        seen[which, place] = after
        assert after != before, f"array {which}, place {place}"
    assert len(seen) > 150 and len(set(seen.values())) == len(seen)


def test_moves_of_many_numbers_change_it():
    config, params = arrays()
    wq, wo, gate = (params.layers[0].wq_nhd, params.layers[0].wo_dnh, params.layers[0].w_gate_fd)

    def ablated(w):
        w = w.copy()
        w[:, 2:] = 0
        return w

    def flipped(w, *places):
        w = w.copy()
        for place in places:
            w[place] *= -1
        return w

    changes = {
        "heads exchanged": dict(wq_nhd=wq[::-1].copy()),
        "heads ablated": dict(wo_dnh=ablated(wo)),
        "columns exchanged": dict(w_gate_fd=gate[:, ::-1].copy()),
        "all signs": dict(w_gate_fd=-gate),
        "two signs": dict(w_gate_fd=flipped(gate, (3, 5), (19, 5))),
        "a rectangle's signs": dict(w_gate_fd=flipped(gate, (0, 0), (0, 16), (16, 0), (16, 16))),
        "a row's signs": dict(w_gate_fd=flipped(gate, 7)),
    }
    found = {"": mark(params)}
    for name, fields in changes.items():
        first = params.layers[0].replace(**fields)
        found[name] = mark(params.replace(layers=(first, *params.layers[1:])))
    found["layers"] = mark(params.replace(layers=params.layers[::-1]))
    found["embedding trained"] = mark(params.replace(
        embed_vd=np.concatenate([params.embed_vd[:1], params.embed_vd[1:] * 1.5])))
    assert len(set(found.values())) == len(found), found
    assert len({x[:8] for x in found.values()}) == 1


@pytest.mark.parametrize("scale", [1e-40, 1e-38, 1.0, 3.4e38])
def test_rounding_is_that_of_a_bfloat16_load(scale):
    """Test subnormals, ties, the largest values, zeros of both signs, and NaN."""
    config, params = arrays()
    with np.errstate(over="ignore"):
        wide = (RNG.normal(size=params.embed_vd.shape) * scale).astype(np.float32)
    bits = wide.reshape(-1).view(np.uint32)
    # ties between two bfloat16 values
    bits[::2] = bits[::2] & np.uint32(0xFFFF0000) | np.uint32(0x8000)
    wide.reshape(-1)[1:6] = 0.0, -0.0, np.inf, -np.inf, np.nan
    with np.errstate(all="ignore"):
        narrow = wide.astype(ml_dtypes.bfloat16)
    assert mark(params.replace(embed_vd=wide)) == mark(params.replace(embed_vd=narrow))


def test_float16_keeps_it_where_all_numbers_fit():
    """A float16 copy has the same fingerprint only if float16 represents all values."""
    config, params = arrays()
    exact = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    exact = jax.tree.map(lambda x: np.where(np.abs(x) < 1e-3, np.float32(0), x), exact)

    def half(tree):
        return jax.tree.map(lambda x: x.astype(np.float16), tree)

    assert mark(half(exact)) == mark(exact)
    small = exact.replace(final_norm_d=exact.final_norm_d * np.float32(2.0**-20))
    assert mark(half(small)) != mark(small)


def test_a_field_that_is_added_changes_no_hash_unless_it_is_used():
    @dataclasses.dataclass(frozen=True)
    class Later(ModelConfig):
        logit_scale: float = 1.0

    @dataclasses.dataclass(frozen=True)
    class LaterRope(Rope):
        beta: float = 32.0

    config = s.tiny_config()
    assert config.hash() == "670a0ff7"  # stored in existing files, so it must not change
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    assert Later(**fields).hash() == config.hash()
    assert Later(**fields, logit_scale=2.0).hash() != config.hash()
    assert Later(**{**fields, "rope": LaterRope()}).hash() == config.hash()
    assert Later(**{**fields, "rope": LaterRope(beta=1.0)}).hash() != config.hash()
    for name, value in fields.items():
        other = {"family": "llama", "activation": "gelu_tanh", "windows": (4, None, None),
                 "rope": Rope(5.0), "rope_local": Rope()}.get(
                     name, value * 2 if type(value) in (int, float) and value else 8)
        if type(value) is bool:
            other = not value
        if name in ("n_layers", "n_heads", "n_kv_heads"):
            continue  # other fields depend on these
        assert dataclasses.replace(config, **{name: other}).hash() != config.hash(), name


def test_a_model_with_other_parameters_has_its_own():
    config, params = arrays()
    params = jax.tree.map(jnp.asarray, params)
    model = Model(config, params, None, None, "m", fingerprint(config, params), (), False)
    assert dataclasses.replace(model, name="n").fingerprint == model.fingerprint
    zeroed = params.layers[0].replace(wo_dnh=jnp.zeros_like(params.layers[0].wo_dnh))
    other = dataclasses.replace(model, params=params.replace(layers=(zeroed, params.layers[1])))
    assert other.fingerprint == fingerprint(config, other.params) != model.fingerprint
    assert dataclasses.replace(other, params=model.params).fingerprint == model.fingerprint
    jp.generate(other, [[5, 6]], max_new_tokens=1, batch_size=1)
    axis = Axis(np.ones((2, 32)), fingerprint=model.fingerprint)
    with pytest.raises(ValueError, match="made for another model"):
        jp.generate(other, [[5, 6]], interventions=jp.cap(axis, layers=1, floor=0.0))
    traced = []
    jax.jit(lambda p: traced.append(dataclasses.replace(model, params=p)) or p.embed_vd)(params)
    assert traced[0].fingerprint == ""


def test_a_copy_with_another_configuration_has_its_own():
    config, params = s.tiny_model().config, s.tiny_model().params
    model = Model(config, params, None, None, "m", fingerprint(config, params), (), False)
    other = dataclasses.replace(model, config=dataclasses.replace(config, norm_eps=1e-5))
    assert other.fingerprint == fingerprint(other.config, params) != model.fingerprint
    abstract = dataclasses.replace(model, params=abstract_params(config))
    assert abstract.fingerprint == "" and abstract.params.like.dtype == jnp.bfloat16
    assert [origin(mark) for mark in ("", "0" * 8 + "0000001f", "ff" * 8)] == [0, 31, 2**32 - 1]


def old_file(path, vector):
    """Write a file in the format used before fingerprints had schemes."""
    save_vector(path, vector)
    tensors, header = files.read_tensors(path)
    assert header.pop("fingerprint_scheme") == str(SCHEME)
    files.write_tensors(path, tensors, header)


@pytest.mark.parametrize("kind", ["axis", "caps"])
def test_an_old_file_is_accepted_by_its_shape_with_a_warning(tmp_path, kind):
    model = s.tiny_model(**SHAPE)
    for half, fits in ((model.config.hash(), True), ("0" * 8, False)):
        made = Axis(np.ones((2, 32)), model="tiny", fingerprint=half + "12345678")
        if kind == "caps":
            made = Caps(np.ones((1, 32)), (1,), [0.0], ("a",), "e", "tiny", half + "12345678")
        old_file(tmp_path / "old.safetensors", made)
        with pytest.warns(UserWarning, match=r"old.safetensors: its fingerprint has scheme 1 .*"
                          r"scheme 2, so the model's weights are not checked.*convert .* "
                          "--model tiny"):
            found = (load_caps if kind == "caps" else load_vector)(tmp_path / "old.safetensors")
        found = found["e"] if kind == "caps" else found
        assert found.fingerprint_scheme == 1 and found.fingerprint == half + "12345678"
        if not fits:
            with pytest.raises(ValueError, match="made for another model"):
                fitted(found, model.config, "tiny", model.fingerprint)
            continue
        assert fitted(found, model.config, "tiny", model.fingerprint) is found
        edits = (found.interventions() if kind == "caps" else jp.cap(found, layers=1, floor=0.0))
        jp.generate(model, [[5, 6]], interventions=edits, max_new_tokens=1, batch_size=1)
        save_vector(tmp_path / "again.safetensors", found)  # the scheme is saved with the vector
        with pytest.warns(UserWarning, match="scheme 1"):
            (load_caps if kind == "caps" else load_vector)(tmp_path / "again.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
def test_the_scheme_is_kept_in_files(tmp_path, suffix, recwarn):
    if suffix == ".gguf":
        pytest.importorskip("gguf")
    made = Vector(np.ones((3, 8)), fingerprint="ab" * 8)
    save_vector(tmp_path / f"v{suffix}", made)
    assert load_vector(tmp_path / f"v{suffix}").fingerprint_scheme == SCHEME and not recwarn.list
    save_vector(tmp_path / f"w{suffix}", dataclasses.replace(made, fingerprint_scheme=7))
    with pytest.warns(UserWarning, match="scheme 7 .from a later version"):
        assert load_vector(tmp_path / f"w{suffix}").fingerprint_scheme == 7


@pytest.mark.parametrize(("fingerprint", "stored", "scheme"), [
    ("ab" * 8, None, 1), ("ab" * 8, "", 1), ("ab" * 8, "7", 7), ("ab" * 8, 999_999, 999_999),
    ("", None, SCHEME), (None, "7", SCHEME)])
def test_a_file_without_a_scheme_has_the_first_and_one_without_a_fingerprint_the_latest(
        fingerprint, stored, scheme):
    assert files.scheme_of(fingerprint, stored) == scheme


def test_a_scheme_that_is_no_number_is_refused(tmp_path):
    for value in ("0", "01", "-1", "1000000", "1.5"):
        with pytest.raises(ValueError, match="fingerprint_scheme is"):
            files.scheme_of("ab" * 8, value)
    for value in (0, -1, "2", True):
        with pytest.raises(ValueError, match="fingerprint_scheme is"):
            Vector(np.ones((3, 8)), fingerprint_scheme=value)
    path = tmp_path / "v.safetensors"
    save_vector(path, Vector(np.ones((3, 8)), fingerprint="ab" * 8))
    tensors, header = files.read_tensors(path)
    files.write_tensors(path, tensors, {**header, "fingerprint_scheme": "two"})
    with pytest.raises(ValueError, match="v.safetensors: fingerprint_scheme is 'two'"):
        load_vector(path)


def test_a_file_is_stamped_anew(tmp_path, capsys):
    """`vectors convert --model` writes the new fingerprint and its scheme."""
    config, params = arrays()
    hf.save(tmp_path / "m", jax.tree.map(jnp.asarray, params), config)
    old_file(tmp_path / "old.safetensors",
             Axis(np.ones((2, 32)), fingerprint=config.hash() + "12345678"))
    with warnings.catch_warnings():
        # as outside tests: a warning is printed as one line
        warnings.simplefilter("always")
        assert s.run_command(["vectors", "convert", str(tmp_path / "old.safetensors"),
                              str(tmp_path / "new.safetensors"), "--model",
                              str(tmp_path / "m")]) == 0
    said = capsys.readouterr().err
    assert "warning: " in said and "scheme 1" in said
    found = load_vector(tmp_path / "new.safetensors")
    assert found.fingerprint == load(tmp_path / "m").fingerprint
    assert found.fingerprint_scheme == SCHEME


def test_caps_and_vectors_fit_a_model_of_their_layers_width_and_weights():
    config = s.tiny_config(**SHAPE)  # two layers
    mine, other = config.hash() + "12345678", config.hash() + "00000001"
    width = config.d_model

    def caps(layer, width=width, **more):
        return Caps(np.ones((1, width)), (layer,), [0.0], ("a",), **more)

    def vector(layers, width=width, **more):
        return Vector(np.ones((layers, width)), **more)

    later = {"fingerprint": "ab" * 8, "fingerprint_scheme": SCHEME + 1}
    for found in (caps(0), caps(1), vector(2), caps(1, fingerprint=mine),
                  vector(2, fingerprint=mine), caps(1, **later), vector(2, **later)):
        assert fitted(found, config, "tiny", mine) is found
    for found in (caps(2), caps(1, width + 1), vector(1), vector(3), vector(2, width + 1),
                  caps(1, fingerprint=other), vector(2, fingerprint=other)):
        with pytest.raises(ValueError, match="cannot be used with tiny"):
            fitted(found, config, "tiny", mine)
    # without the fingerprint of the weights, only the configuration is compared
    assert fitted(vector(2, fingerprint=other), config, "tiny").fingerprint == other
    with pytest.raises(ValueError, match="cannot be used with tiny"):
        fitted(vector(2, fingerprint="0" * 16), config, "tiny")
    edit = caps(1, fingerprint=mine).interventions(where="user").edits[0]
    assert edit.origin[0] == 0x12345678
    np.testing.assert_array_equal(edit.where, [jp.user.encode()])
