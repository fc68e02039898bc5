"""Where arrays are placed on a mesh, and meshes that are rejected."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from jax.sharding import AbstractMesh, AxisType
from test_sharding import ROWS, decode_step, one_device, spread

from jaxpersona.distributed import sharding
from jaxpersona.engine.generate import generate
from jaxpersona.models.batch import batch
from jaxpersona.models.forward import forward
from jaxpersona.models.params import layout
from jaxpersona.planning import hlo

pytestmark = pytest.mark.usefixtures("compile_fast")


def test_nothing_changes_without_a_mesh():
    model = one_device("llama")
    source = jax.tree.map(jnp.asarray, batch(ROWS))
    for found in (sharding.out_sharding(("batch", None), source.tokens),
                  sharding.mesh_of(source.tokens, 3.0)):
        assert found is None
    assert sharding.place(source.tokens, ("batch", None)) is source.tokens
    assert sharding.gather_weight(model.params.embed_vd) is model.params.embed_vd
    assert not hlo.collectives(decode_step(model))


@pytest.mark.parametrize(("axes", "rows", "weight", "embedding", "cache"), [
    ({"data": 8}, 1, (48, 32), (96, 32), (1, 2, 32, 12)),
    # one key/value head per group of two devices
    ({"data": 2, "model": 4}, 4, (12, 32), (24, 32), (4, 1, 32, 12)),
    ({"fsdp": 8}, 1, (48, 4), (96, 4), (1, 2, 32, 12)),
    ({"fsdp": 4, "model": 2}, 2, (24, 8), (48, 8), (2, 1, 32, 12)),
    ({"data": 2, "fsdp": 2, "model": 2}, 2, (24, 16), (48, 16), (2, 1, 32, 12)),
])
def test_every_device_holds_its_share_of_rows_weights_and_cache(axes, rows, weight, embedding,
                                                                cache):
    """Rows are sharded over data and fsdp; MLP width, vocabulary and heads over model."""
    model = spread(one_device("llama"), sharding.make_mesh(**axes))
    out = jax.jit(forward, static_argnames=("slots",))(
        model.params, model.config, batch(ROWS), slots=32)
    made = (out.logits, model.params.layers[0].w_up_fd, model.params.embed_vd, out.cache.k[0])
    shapes = [x.addressable_shards[0].data.shape for x in made]
    assert [shapes[0][0], *shapes[1:]] == [rows, weight, embedding, cache]
    assert sharding.rows_divisor(model.params.embed_vd) == 8 // rows


def test_heads_that_do_not_divide_the_mesh_are_held_by_groups():
    model = one_device("llama")
    fitted = sharding.fit(sharding.make_mesh(model=8), model.config)
    assert dict(fitted.shape) == {"data": 1, "model": 2, "group": 4}
    assert sharding.fit(fitted, model.config) is fitted
    placed = spread(model, fitted).params.layers[0]
    assert placed.wk_khd.sharding.shard_shape(placed.wk_khd.shape)[0] == 1  # one head per group
    assert placed.wq_nhd.sharding.shard_shape(placed.wq_nhd.shape)[0] == 1
    odd = dataclasses.replace(model.config, vocab_size=97)
    spec = layout(odd).embed_vd
    assert sharding.weight_sharding(spec.axes, spec.shape, fitted).is_fully_replicated


@pytest.mark.parametrize(("mesh", "fields", "wanted"), [
    (dict(data=3, model=3), {}, "data=3 × model=3 needs 9 devices; available: 8"),
    (dict(model=0), {}, "every axis must be at least 1"),
    (dict(fsdp=-1), {}, "fsdp=-1 × model=1 needs -1 devices; every axis must be at least 1"),
    (dict(data=2.0), {}, "data is 2.0; it must be an integer"),
    (dict(fsdp=1.0), {}, "fsdp is 1.0; it must be an integer"),
    (dict(model=5, devices=range(4)), {}, "model=5 needs 5 devices; available: 4"),
    (dict(data=2, fsdp=8), {}, "fsdp=8 × model=1 needs 16 devices; available: 8"),
    (dict(model=4), dict(n_kv_heads=6, n_heads=12), "n_kv_heads is 6, .* use model=3"),
    (dict(model=8), dict(n_kv_heads=4, n_heads=4), "n_heads / n_kv_heads is 1, .*use model=4"),
    (dict(model=8), dict(d_ff=36, n_heads=8, n_kv_heads=8), "d_ff is 36, .* use model=6"),
    (dict(fsdp=8), dict(d_model=36), "d_model is 36, .* use fsdp=6"),
])
def test_wrong_meshes_are_refused_in_one_line_with_the_mend(mesh, fields, wanted):
    with pytest.raises(ValueError, match=wanted) as caught:
        sharding.fit(sharding.make_mesh(**mesh), s.tiny_config(**fields))
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_does_not_divide_is_whole_on_every_device_but_its_width_is_split():
    mesh = AbstractMesh((2, 4), ("fsdp", "model"), axis_types=(AxisType.Explicit,) * 2)
    for vocabulary, share in ((97, 97), (96, 24)):
        shape = (vocabulary, 32)
        assert sharding.weight_sharding(("vocab", "embed"), shape, mesh).shard_shape(shape) == (
            share, 16)


def test_the_platform_of_values_without_devices_is_that_of_the_program():
    here = jax.device_put(np.ones(2, np.float32))
    assert sharding.platform(np.ones(2)) == sharding.platform(here) == jax.default_backend()
    assert sharding.on_cpu(here) is (jax.default_backend() == "cpu")
    with sharding.running_on("gpu"):
        with sharding.running_on("tpu"):
            assert sharding.platform(np.ones(2), 3.0) == "tpu" and not sharding.on_cpu(np.ones(2))
            assert sharding.platform(np.ones(2), here) == jax.default_backend()
        assert sharding.platform() == "gpu" and sharding.in_program()
    assert not sharding.in_program()
    with jax.default_device("cpu"):
        assert sharding.default_device() == jax.local_devices(backend="cpu")[0]
    with jax.default_device(jax.devices()[3]):
        assert sharding.default_device() == jax.devices()[3]


def test_a_set_mesh_of_auto_axes_does_not_concern_an_array_on_one_device():
    here = jax.device_put(np.ones(2, np.float32))
    for kind, wrong in ((AxisType.Auto, False), (AxisType.Explicit, True)):
        context = pytest.raises(ValueError, match="the mesh x=8 is set, but the model is on one")
        with jax.set_mesh(jax.make_mesh((8,), ("x",), axis_types=(kind,))):
            with context if wrong else contextlib.nullcontext():
                sharding.check_set_mesh(here)


def test_a_mesh_takes_the_first_of_the_given_devices():
    mesh = sharding.make_mesh(data=1, model=2, devices=jax.devices()[4:])
    assert mesh.devices.ravel().tolist() == jax.devices()[4:6]
    assert dict(mesh.shape) == {"data": 1, "model": 2}
    assert dict(sharding.make_mesh(2, 2, fsdp=2).shape) == {"data": 2, "fsdp": 2, "model": 2}


def test_other_misuse_of_a_mesh_is_refused():
    model = spread(one_device("llama"), sharding.make_mesh(data=4, model=2))
    with pytest.raises(ValueError, match="of the batch is 3, .*4 shards; use a multiple of 4"):
        s.run(model.params, model.config, batch(ROWS[:3]))
    with pytest.raises(ValueError, match="batch_size is 6, .*use a multiple of 4"):
        generate(model, ROWS, batch_size=6)
    strange = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match=r"unknown axes \['tensor'\]; use data, fsdp, "
                                         "group, model"):
        sharding.fit(strange, model.config)


def test_an_axis_is_given_once():
    assert sharding.parse_mesh("data=2, model=4") == {"data": 2, "model": 4}
    with pytest.raises(ValueError, match="mesh is 'data=2,data=4'"):
        sharding.parse_mesh("data=2,data=4")
