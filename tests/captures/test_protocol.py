"""A reading defined outside the package: the example in docs/architecture.md against NumPy."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re

import jax
import numpy as np
import pytest
import support as s

from jaxpersona.captures import capture
from jaxpersona.captures.reading import Reading, State
from jaxpersona.distributed import sharding
from jaxpersona.engine.extract import extract
from jaxpersona.engine.generate import generate
from jaxpersona.interventions.where import everywhere, generated
from jaxpersona.models.batch import ASSISTANT, GENERATED, USER, batch, split
from jaxpersona.models.cache import init_cache
from jaxpersona.models.carry import Carry
from jaxpersona.models.params import layout

MODEL = s.tiny_model()
LENGTHS = (9, 6, 7, 4)
KIND = [[USER] * 3 + [ASSISTANT] * (n - 3) for n in LENGTHS]
ROWS = batch(s.prompts(LENGTHS), kind=KIND)
DOCS = pathlib.Path(__file__).parents[2] / "docs" / "architecture.md"


@functools.cache
def example():
    """Return the names that the example in the documentation defines."""
    text = DOCS.read_text().split("## Adding a reading")[1]
    block = re.search(r"```python\n(.*?)```", text, re.S)
    assert block is not None
    names: dict = {"__name__": "example"}
    exec(compile(block[1], str(DOCS), "exec"), names)
    return names


@functools.cache
def expected():
    """Return [B, L]: the largest norm over the assistant's tokens, computed with NumPy."""
    h, _ = s.residuals(MODEL, ROWS)
    norms = np.linalg.norm(np.asarray(h, np.float64), axis=-1)
    said = (np.asarray(ROWS.kind) & ASSISTANT) > 0
    return np.where(said[:, None], norms, 0).max(-1)


def test_in_one_pass_beside_a_reading_of_the_package():
    read = capture.mean() | example()["peak"]()
    out = s.run(MODEL.params, MODEL.config, ROWS, capture=read)
    np.testing.assert_allclose(out.captured["peak"].value, expected(), rtol=1e-5)
    assert repr(read) == "mean(response) | peak(response)"
    assert isinstance(read.readings["peak"], Reading)
    assert isinstance(out.captured["peak"], State)


@pytest.mark.parametrize("size", [1, 4])
def test_in_chunks(size):
    carry = Carry(cache=init_cache(MODEL.config, len(LENGTHS), 12))
    for chunk in split(ROWS, size):
        carry = s.run(MODEL.params, MODEL.config, chunk, capture=example()["peak"](),
                      carry=carry).carry
    np.testing.assert_allclose(carry.captured["peak"].value, expected(), rtol=1e-5)


def test_while_generating_and_of_finished_texts():
    rows = s.prompts((5, 3, 8), seed=2)
    out = generate(MODEL, rows, capture=example()["peak"](generated), max_new_tokens=4,
                   batch_size=2)
    texts = [[*row, *said] for row, said in zip(rows, out.tokens, strict=True)]
    kind = [[USER] * len(row) + [ASSISTANT | GENERATED] * len(said)
            for row, said in zip(rows, out.tokens, strict=True)]
    whole = batch(texts, kind=kind)
    norms = np.linalg.norm(np.asarray(s.residuals(MODEL, whole)[0], np.float64), axis=-1)
    chosen = (np.asarray(whole.kind) & GENERATED) > 0
    np.testing.assert_allclose(out.captured["peak"],
                               np.where(chosen[:, None], norms, 0).max(-1), rtol=1e-5)
    valid = np.asarray(whole.kind) > 0
    found = extract(MODEL, texts, capture=example()["peak"](everywhere))
    np.testing.assert_allclose(found.captured["peak"],
                               np.where(valid[:, None], norms, 0).max(-1), rtol=1e-5)


def test_on_a_mesh_of_two_devices():
    mesh = sharding.fit(sharding.make_mesh(data=2), MODEL.config)
    params = jax.tree.map(
        lambda x, spec: jax.device_put(x, sharding.weight_sharding(spec.axes, spec.shape, mesh)),
        MODEL.params, layout(MODEL.config))
    model = dataclasses.replace(MODEL, params=params, mesh=mesh)
    out = s.run(model.params, model.config, ROWS, capture=example()["peak"]())
    np.testing.assert_allclose(out.captured["peak"].value, expected(), rtol=1e-5)
    assert len(out.captured["peak"].peak.sharding.device_set) == 2
