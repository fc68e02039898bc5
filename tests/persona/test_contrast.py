"""`jp.contrast` compared with NumPy over separately captured activations."""

from __future__ import annotations

import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.captures import capture
from jaxpersona.engine.prompts import encode

pytestmark = pytest.mark.usefixtures("compile_fast")

MODEL = jp.load("mini")
GOOD = ["I love it.", "What a joy this is, my friend!", "Thank you."]
BAD = ["I hate it.", "How sad.", "Go away, I do not want you here at all."]


def replied(texts):
    return [[{"role": "user", "content": "Well?"}, {"role": "assistant", "content": text}]
            for text in texts]


def activations(texts, pool):
    """Return [n, L, D], one text at a time, from the full residuals."""
    out = []
    for text in texts:
        row = encode(MODEL, text, reply=pool == "last")
        (full,) = jp.extract(MODEL, [row], capture=capture.full()).captured["full"]
        if pool == "last":
            out.append(full[:, -1])
            continue
        test = jp.response if pool == "response" else jp.user.without("template")
        batch = jp.encode(MODEL, [text], reply=False)
        chosen = np.asarray(jp.where.holds(test.encode(), batch))[0, : row.tokens.size]
        out.append(full[:, chosen].mean(1))
    return np.stack(out).astype(np.float64)


@pytest.mark.parametrize("pool", ["last", "response", "prompt"])
def test_the_mean_difference_is_that_of_the_pooled_activations(pool):
    good, bad = (replied(t) if pool == "response" else t for t in (GOOD, BAD))
    vector = jp.contrast(MODEL, good, bad, pool=pool)
    wanted = activations(good, pool).mean(0) - activations(bad, pool).mean(0)
    assert s.relative(vector.values, wanted).max() < 1e-4
    assert vector.fingerprint == MODEL.fingerprint and vector.notes["pool"] == pool
    back = jp.contrast(MODEL, bad, good, pool=pool)
    assert s.relative(back.values, -vector.values).max() < 1e-5


def test_the_default_pool_follows_the_texts():
    assert jp.contrast(MODEL, GOOD, BAD).notes["pool"] == "last"
    assert jp.contrast(MODEL, replied(GOOD), replied(BAD)).notes["pool"] == "response"
    with pytest.raises(jp.UserError, match="some texts end with an assistant message"):
        jp.contrast(MODEL, replied(GOOD), BAD)


def test_pca_is_the_first_component_of_the_pairs():
    vector = jp.contrast(MODEL, GOOD, BAD, method="pca", pool="last")
    pairs = activations(GOOD, "last") - activations(BAD, "last")
    for layer in range(MODEL.config.n_layers):
        values, vectors = np.linalg.eigh(pairs[:, layer].T @ pairs[:, layer])
        first = vectors[:, -1]
        wanted = (pairs[:, layer].mean(0) @ first) * first
        assert np.linalg.norm(vector.values[layer] - wanted) < 1e-3 * np.linalg.norm(wanted)
    for argument in (GOOD[:2], [*GOOD, "More."]):
        with pytest.raises(jp.UserError, match="needs pairs"):
            jp.contrast(MODEL, argument, BAD, method="pca")


def test_layers_restrict_what_is_computed():
    whole, part = jp.contrast(MODEL, GOOD, BAD), jp.contrast(MODEL, GOOD, BAD, layers=slice(2, 4))
    assert s.relative(part.values[2:4], whole.values[2:4]).max() < 1e-5
    assert not part.values[:2].any() and not part.values[4:].any()


def test_the_direction_steers(tmp_path):
    vector = jp.contrast(MODEL, GOOD, BAD, name="joy")
    plain, steered = (jp.generate(MODEL, ["Hello."], interventions=edits, max_new_tokens=12).text
                      for edits in (None, jp.steer(vector, layers=4, scale=4.0)))
    assert plain != steered
    jp.save_vector(tmp_path / "joy.safetensors", vector)
    again = jp.load_vector(tmp_path / "joy.safetensors")
    assert s.same_bits(again.values, vector.values) and again.name == "joy"


@pytest.mark.parametrize("arguments, message", [
    (dict(positive=[]), "positive is empty"),
    (dict(negative="How sad."), "negative is a single string"),
    (dict(method="median"), "method is 'median'; it must be one of mean, pca"),
    (dict(pool="first"), "pool is 'first'; it must be one of response, last, prompt"),
    (dict(pool="response"), "no token|no assistant message"),
    (dict(negative=GOOD), "same mean activations"),
    (dict(layers=99), "layers is 99"),
])
def test_mistakes_name_argument_and_fix(arguments, message):
    with pytest.raises(jp.UserError, match=message):
        jp.contrast(MODEL, **{"positive": GOOD, "negative": BAD, **arguments})
