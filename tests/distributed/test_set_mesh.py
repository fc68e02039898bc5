"""The effect of a mesh set by the caller (`jax.set_mesh`) on functions of a model."""

from __future__ import annotations

import jax
import pytest
import support as s
from jax.sharding import AxisType
from jaxpersona.ckpts.loading import load
from test_sharding import ROWS, V, one_device, spread

from jaxpersona.captures import capture
from jaxpersona.distributed import sharding
from jaxpersona.engine.extract import extract
from jaxpersona.engine.generate import generate
from jaxpersona.interventions import cap
from jaxpersona.models.batch import batch
from jaxpersona.models.forward import forward

pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.mark.parametrize("setting", [
    "the caller's", *(pytest.param(x, marks=pytest.mark.slow) for x in ("the model's", "another"))])
def test_a_mesh_that_is_set_does_not_reach_the_functions_of_a_model(setting):
    """`fit` splits a "model" axis of 4 for 2 key/value heads, so the two meshes differ."""
    given = sharding.make_mesh(data=2, model=4)
    model = spread(one_device("llama"), given)
    mesh = {"the caller's": given, "the model's": model.mesh,
            "another": jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))}[setting]

    def both(model):
        # created while the mesh is set
        edits = cap(V, layers=[0, 1], floor=0.5, rows=[0, 1, 2, -1] * 2)
        read = capture.mean() | capture.projections(V)
        out = generate(model, ROWS, interventions=edits, capture=read, max_new_tokens=3,
                       batch_size=8, temperature=[0.0, 0.7] * 4)
        return out.tokens, out.captured, extract(model, ROWS, interventions=edits,
                                                 capture=capture.last()).captured

    for one in (model, one_device("llama")):
        wanted = both(one)
        with jax.set_mesh(mesh):
            assert s.same_bits(both(one), wanted)
        assert jax.sharding.get_abstract_mesh().empty


def test_a_forward_pass_names_the_mesh_to_set():
    given = sharding.make_mesh(data=2, model=4)
    model = spread(one_device("llama"), given)
    with jax.set_mesh(given):
        with pytest.raises(ValueError, match="data=2 × model=4, but the model's mesh is data=2 × "
                           "model=2 × group=2: use `with jax.set_mesh.model.mesh.`") as caught:
            forward(model.params, model.config, batch(ROWS))
        assert "\n" not in str(caught.value)
        alone = one_device("llama")
        with pytest.raises(ValueError, match="the model is on one device: omit jax.set_mesh"):
            forward(alone.params, alone.config, batch(ROWS))


def test_a_mesh_of_the_same_sizes_with_other_names_is_another():
    model = spread(one_device("llama"), sharding.make_mesh(data=2, model=2))
    other = jax.make_mesh((2, 2), ("model", "data"), axis_types=(AxisType.Explicit,) * 2,
                          devices=jax.devices()[:4])
    with jax.set_mesh(other), pytest.raises(ValueError, match="is model=2 × data=2, but .* is "
                                            "data=2 × model=2: use"):
        forward(model.params, model.config, batch(ROWS))


def test_a_model_is_loaded_while_the_caller_s_mesh_is_set():
    mesh = sharding.make_mesh(data=2, model=4)
    for name in ("mini", "random:qwen3-mini"):
        wanted = load(name, mesh=mesh)
        with jax.set_mesh(mesh):
            assert load(name, mesh=mesh).fingerprint == wanted.fingerprint
