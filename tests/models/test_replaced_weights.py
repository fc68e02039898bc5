"""Arrays derived from weights are recomputed if any weight array is replaced."""

from __future__ import annotations

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import support as s

from jaxpersona.engine.generate import generate
from jaxpersona.models import prepared
from jaxpersona.models.model import Model, release
from jaxpersona.models.params import Derived
from jaxpersona.models.prepared import fast_params, in_out

PROMPTS = s.prompts((5, 9, 3))


def made(seed=0):
    tiny = s.tiny_model(seed=seed)
    return Model(tiny.config, tiny.params, None, None, "m", tiny.fingerprint, (), False)


def test_a_replaced_array_is_used_whichever_it_is():
    model = made()
    fast_params(model, 8)
    leaves, tree = jax.tree.flatten(model.params)
    for i in range(len(leaves)):
        params = tree.unflatten([*leaves[:i], leaves[i] * 0.5, *leaves[i + 1:]])
        other = dataclasses.replace(model, params=params)
        assert s.same_bits(fast_params(other, 8), in_out(params)), f"array {i}"
    assert s.same_bits(fast_params(model, 8), in_out(model.params))


def test_parameters_of_numpy_have_the_fingerprint_of_their_values():
    """Otherwise a direction of a different model with the same shape would be accepted silently."""
    model = made()
    same = dataclasses.replace(model, params=jax.tree.map(np.asarray, model.params))
    other = dataclasses.replace(model, params=jax.tree.map(
        lambda x: np.asarray(x) * np.float32(0.5), model.params))
    assert len(model.fingerprint) == 16
    assert same.fingerprint == model.fingerprint != other.fingerprint


def test_edited_layers_generate_the_same_at_every_batch_size():
    model = made()
    kept = dict(max_new_tokens=8)
    before = generate(model, PROMPTS, batch_size=8, **kept).tokens
    layers = jax.tree.map(lambda w: w * 0.5, model.params.layers)
    other = dataclasses.replace(model, params=model.params.replace(layers=layers))
    few, many = (generate(other, PROMPTS, batch_size=n, **kept).tokens for n in (2, 8))
    assert s.same_bits(few, many) and not s.same_bits(before, many)


def test_the_copy_is_made_once_and_belongs_to_its_model():
    model, other = made(), made(seed=1)
    first = fast_params(model, 8)
    fast_params(other, 32)
    assert fast_params(model, 16) is first
    assert fast_params(model, 4) is model.params


def test_no_copy_is_made_of_bfloat16_or_of_a_model_above_the_limit(monkeypatch):
    model = made()
    size = model.config.bytes(4)
    monkeypatch.setattr(prepared, "_LARGEST_COPY", size - 1)
    assert fast_params(model, 8) is model.params
    monkeypatch.setattr(prepared, "_LARGEST_COPY", size)
    assert fast_params(model, 8) is not model.params
    narrow = dataclasses.replace(model, params=jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), model.params))
    assert fast_params(narrow, 8) is narrow.params


def test_released_weights_are_gone_and_the_fingerprint_stays():
    model = made(seed=2)
    mark, copy = model.fingerprint, fast_params(model, 8)
    release(model)
    assert all(x.is_deleted() for x in jax.tree.leaves(model.params))
    assert model.fingerprint == mark and model.derived._held is None
    assert not copy.layers[0].wo_dnh.value.is_deleted()
    release(model)  # again, without an error


def test_arrays_of_numpy_that_change_in_place_are_read_again():
    params = jax.tree.map(np.array, made().params)
    model = dataclasses.replace(made(), params=params)
    fast_params(model, 8)
    params.layers[0].wo_dnh[...] = 0
    assert not np.asarray(fast_params(model, 8).layers[0].wo_dnh.value).any()


def test_models_in_threads_keep_their_own_copies():
    models = [made(seed) for seed in range(2)]
    wanted = [in_out(model.params).layers[0].w_up_fd.value for model in models]
    wrong = []

    def ask(i):
        for _ in range(200):
            found = fast_params(models[i], 8).layers[0].w_up_fd.value
            if found is not first[i] or not np.array_equal(found, wanted[i]):
                wrong.append(i)

    first = [fast_params(model, 8).layers[0].w_up_fd.value for model in models]
    threads = [threading.Thread(target=ask, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_model_that_no_cache_belongs_to_is_never_stale():
    tiny = s.tiny_model()
    fast_params(tiny, 8)
    other = dataclasses.replace(tiny, params=tiny.params.replace(
        final_norm_d=jnp.zeros_like(tiny.params.final_norm_d)))
    assert not np.asarray(fast_params(other, 8).final_norm_d).any()


def test_what_is_derived_is_known_by_its_function_and_its_structure():
    derived, x = Derived(), jnp.ones(2)
    assert derived.get({"a": x}, sorted) == ["a"] and derived.get({"b": x}, sorted) == ["b"]
    assert derived.get({"b": x}, len) == 1
    calls = []

    def count(tree):
        return calls.append(tree) or len(calls)

    assert [derived.get({"a": x}, count), derived.get({"a": x}, count)] == [1, 1]
