"""Captures against NumPy on every activation: in one pass, in pieces and while generating."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import support as s

from jaxpersona import capture
from jaxpersona.batch import ASSISTANT, GENERATED, TEMPLATE, USER, batch, split
from jaxpersona.cache import init_cache
from jaxpersona.generate import generate
from jaxpersona.interventions import steer
from jaxpersona.interventions.where import everywhere, generated, prompt, response
from jaxpersona.vectors import Axis

MODEL = s.tiny_model()
LENGTHS, WIDTH, TURNS = (14, 9, 3), 14, 3
RNG = np.random.default_rng(7)
KIND = [RNG.choice([USER, TEMPLATE, ASSISTANT, ASSISTANT | GENERATED], n) for n in LENGTHS]
KIND[2][:] = USER  # a row without a response
TURN = [np.sort(RNG.integers(0, TURNS + 1, n)) for n in LENGTHS]  # one more than is captured
ROWS = batch(s.prompts(LENGTHS), kind=KIND, turn=TURN)
K = RNG.normal(size=(4, 32))
EACH = RNG.normal(size=(2, 1, 32))
AXIS = Axis(RNG.normal(size=(3, 32)))
SITES = ("residual", "attention", "mlp")
READ = (
    capture.mean() | capture.mean(everywhere, layers=[0, 2], name="two")
    | capture.mean(response, turns=TURNS, name="turns")
    | capture.last() | capture.last(response, layers=1, name="last response")
    | capture.projections(K) | capture.projections(EACH, response, layers=[0, 2], name="each")
    | capture.projections(AXIS, layers=slice(1, 3), name="axis")
)
for site in SITES:
    READ = READ | capture.full(site=site, name=f"full {site}")
READ = READ | capture.mean(everywhere, site="mlp", name="mlp") | capture.full(response, name="some")


def unit(v):
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def mean_of(h, chosen):
    """[B, L, D] of h [B, L, T, D] over chosen [B, T]; NaN where none is."""
    return np.stack([h[b][:, chosen[b]].mean(1) if chosen[b].any()
                     else np.full(h.shape[1:2] + h.shape[3:], np.nan) for b in range(len(h))])


def expected(h, mlp):
    """Every reading of READ in NumPy from the residuals h and the MLP outputs, [B, L, T, D]."""
    kind, turn = np.asarray(ROWS.kind), np.asarray(ROWS.turn)
    valid = kind & 1 > 0
    said = valid & (kind & ASSISTANT > 0) & (kind & TEMPLATE == 0)

    def last_of(chosen):
        at = [np.flatnonzero(c)[-1] if c.any() else None for c in chosen]
        return np.stack([h[b][:, i] if i is not None else np.full_like(h[b][:, 0], np.nan)
                         for b, i in enumerate(at)])

    def only(x, chosen):
        return np.where(chosen[:, None, :, None], x, np.nan)

    return {
        "mean": mean_of(h, said), "two": mean_of(h, valid)[:, [0, 2]],
        "turns": np.stack([mean_of(h, said & (turn == m)) for m in range(TURNS)], 2),
        "last": last_of(valid), "last response": last_of(said)[:, [1]],
        "projections": only(h @ unit(K).T, valid),
        "each": only(np.einsum("bltd,lkd->bltk", h[:, [0, 2]], unit(EACH)), said),
        "axis": only(np.einsum("bltd,ld->blt", h[:, 1:], unit(AXIS.values)[1:])[..., None], valid),
        "mlp": mean_of(mlp, valid), "some": only(h, said),
    }


def check(captured):
    found = {name: np.asarray(x.value, np.float64) for name, x in captured.items()}
    cut = {n: v[:, :, :WIDTH] for n, v in found.items() if v.ndim == 4 and n != "turns"}
    h, mlp = cut["full residual"], cut["full mlp"]
    for name, want in expected(h, mlp).items():
        got = cut.get(name, found[name])
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want), err_msg=name)
        far = np.abs(np.nan_to_num(got - want)).max() / np.nanmax(np.abs(want))
        assert far <= 1e-5, f"{name}: {far}"
    return h


def test_one_pass():
    out = s.run(MODEL.params, MODEL.config, ROWS, capture=READ)
    h = check(out.captured)
    plain, _ = s.residuals(MODEL, ROWS)
    assert s.relative(h, plain).max() <= 1e-5
    parts = {n: np.asarray(out.captured[f"full {n}"].value, np.float64) for n in SITES}
    grown = parts["residual"][:, :-1] + parts["attention"][:, 1:] + parts["mlp"][:, 1:]
    assert s.relative(grown, parts["residual"][:, 1:]).max() <= 1e-5


@pytest.mark.parametrize("size", [1, 5])
def test_in_pieces(size):
    cache, captured = init_cache(MODEL.config, 3, 20), None
    for piece in split(ROWS, size):
        out = s.run(MODEL.params, MODEL.config, piece, capture=READ, cache=cache,
                    captured=captured)
        cache, captured = out.cache, out.captured
    plain, _ = s.residuals(MODEL, ROWS)
    assert s.relative(check(captured), plain).max() <= 1e-5


def test_while_generating_equals_a_second_pass():
    model = dataclasses.replace(MODEL, stop_ids=(3, 5, 6, 7))
    rows = s.prompts((12, 7, 30, 3, 20, 9), seed=3)
    read = capture.mean() | s.READ | capture.mean(generated, turns=2, name="turns")
    read = read | capture.last(name="last") | capture.mean(prompt, name="prompt")
    edits = steer(np.ones(32), layers=[1], scale=0.1, where=generated)
    out = generate(model, rows, interventions=edits, capture=read, max_new_tokens=12, batch_size=4,
                   temperature=1.0, seed=1)
    assert 0 < out.stopped.sum() < len(rows), "both ends of a reply must occur"
    for b, row in enumerate(rows):
        said = out.tokens[b]
        n = len(row) + len(said)
        kind = [[USER] * len(row) + [ASSISTANT | GENERATED] * len(said)]
        whole = s.residuals(model, batch([[*row, *said]], kind=kind, width=48), edits)[0][0, :, :n]
        # every token that was said was run, the last one before the limit too; a stop was not
        full = out.captured["full"][b]
        assert full.shape == whole.shape and s.relative(full, whole).max() <= 1e-4
        if len(said):
            want = whole[:, len(row) :].mean(1)
            assert s.rowwise(out.captured["mean"][b], want).max() <= 1e-4
            assert s.rowwise(out.captured["turns"][b][:, 1], want).max() <= 1e-4
        else:
            assert np.isnan(out.captured["mean"][b]).all()
        # the reply to a bare prompt, which is message 0, is message 1
        assert np.isnan(out.captured["turns"][b][:, 0]).all()
        assert s.rowwise(out.captured["last"][b], whole[:, -1]).max() <= 1e-4
        assert s.rowwise(out.captured["prompt"][b], whole[:, : len(row)].mean(1)).max() <= 1e-4


REFUSED = {
    "two captures are called \\['mean'\\]": lambda: capture.mean() | capture.mean(everywhere),
    "must be \\[K, D\\]": lambda: capture.projections(np.ones(8)),
    "a zero": lambda: capture.projections(np.zeros((1, 8))),
    "not finite": lambda: capture.projections(np.full((1, 8), np.inf)),
    "out of range": lambda: capture.mean(layers=-1),
    "reads layer 3": lambda: s.run(MODEL.params, MODEL.config, ROWS,
                                   capture=capture.mean(layers=3)),
    "directions are for 2 layers, but 3": lambda: s.run(
        MODEL.params, MODEL.config, ROWS, capture=capture.projections(np.ones((2, 1, 32)))),
    "directions have width 8": lambda: s.run(MODEL.params, MODEL.config, ROWS,
                             capture=capture.projections(np.ones((1, 8)))),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
