"""The sampler compared with the exact distribution, and independence of rows' draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from scipy import stats

from jaxpersona.distributed.sharding import make_mesh, place
from jaxpersona.engine import sampling as module
from jaxpersona.engine.sampling import (
    CANDIDATES,
    choose,
    most_likely,
        sampling,
    top_in_blocks,
    uniforms,
)

DRAWS, V = 4096, 1024
EARLIER = np.array([0x3E90C0AC, 0x3F605DE0, 0x3D9EE620], np.uint32)
pick = jax.jit(choose)
RNG = np.random.default_rng(0)
STEEP = RNG.normal(size=V) * 2
FLAT = RNG.normal(size=V) * 0.1  # the nucleus has many more tokens than the candidates


def exact(logits, temperature=1.0, top_p=1.0, top_k=0):
    """Apply top-k, then the nucleus of the rest, by sorting."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = p[order].copy()
    if top_k:
        kept[top_k:] = 0
        kept /= kept.sum()
    before = np.cumsum(kept) - kept
    kept[before >= top_p] = 0
    out = np.zeros_like(p)
    out[order] = kept / kept.sum()
    return out


def draw(logits, seed=0, **how):
    logits = jnp.asarray(np.broadcast_to(logits, (DRAWS, V)), jnp.float32)
    rows = jnp.arange(DRAWS, dtype=jnp.uint32)
    return np.asarray(pick(logits, sampling(DRAWS, seed=seed, **how), rows,
                           jnp.full((DRAWS,), 17, jnp.int32)))


CASES = {
    "plain": (STEEP, {"temperature": 1.0}), "cool": (STEEP, {"temperature": 0.7, "top_p": 0.9}),
    "top-k": (STEEP, {"temperature": 1.3, "top_k": 9}),
    "top-k and top-p": (STEEP, {"temperature": 1.0, "top_k": 20, "top_p": 0.6}),
    "flat": (FLAT, {"temperature": 1.0}),
    "flat nucleus": (FLAT, {"temperature": 0.7, "top_p": 0.9}),
    "flat top-k and top-p": (FLAT, {"temperature": 1.0, "top_k": 256, "top_p": 0.5}),
}


@pytest.mark.parametrize("case", CASES)
def test_distribution(case):
    logits, how = CASES[case]
    p = exact(logits, **how)
    if case in ("flat", "flat nucleus"):
        assert (p > 0).sum() > CANDIDATES
    found = np.concatenate([draw(logits, seed, **how) for seed in range(6)])
    counts = np.bincount(found, minlength=V)
    rare = np.sort(p[p > 0])[:2].sum()
    assert counts[p == 0].sum() <= max(4 * rare * found.size, 2), "drawn outside the nucleus"
    order = np.argsort(-p)  # categories with at least 20 expected draws
    bins = np.minimum((np.cumsum(p[order]) * (1 - 1e-9) * found.size / 40).astype(int), 900)
    seen, wanted = (np.bincount(bins, weights=x[order]) for x in (counts, p * found.size))
    full = wanted > 20
    pair = [np.append(x[full], x[~full].sum() + 1e-9) for x in (seen, wanted)]
    assert full.sum() >= 5
    assert stats.chisquare(pair[0], pair[1] * pair[0].sum() / pair[1].sum()).pvalue > 1e-3


def test_greedy_is_the_first_of_the_greatest():
    tied = np.zeros(V)
    tied[[300, 40, 900]] = 2.0
    assert (draw(tied) == 40).all()


@pytest.mark.parametrize("vocabulary", [97, 128 * 128, 128 * 1187, 20_001])
def test_the_greatest_is_found_in_blocks_as_it_is_one_by_one(vocabulary):
    rng = np.random.default_rng(vocabulary)
    logits = rng.integers(-9, 5, (8, vocabulary)).astype(np.float32)  # hundreds of ties
    logits[1] = -np.inf
    logits[2, -1] = logits[3, 0] = 9
    logits[5, [vocabulary // 3, vocabulary // 3 + 1, -1]] = np.inf
    np.testing.assert_array_equal(jax.jit(most_likely)(logits), np.argmax(logits, -1))


@pytest.mark.parametrize("vocabulary", [8_193, 16_384, 20_001, 49_152])
def test_the_most_probable_are_found_in_blocks_as_top_k_finds_them(vocabulary):
    """The values and indices are those of `lax.top_k`, for all ties at the last place too."""
    rng = np.random.default_rng(vocabulary)
    values = rng.random((9, vocabulary)).astype(np.float32)
    values[1] = np.round(values[1], 2)  # about a hundred distinct values
    values[2] = 0.5  # only ties
    values[3] = 0.0
    values[3, rng.permutation(vocabulary)[:255]] = 1.0  # the last place is one of many zeros
    values[4, :200], values[4, 200:] = 1.0, 0.25  # adjacent tokens
    values[5], values[5, -1] = 0.0, 1.0
    values[6, -300:] = 2.0
    values[7, ::64] = 3.0  # at most one token of a block, more than `CANDIDATES` in large ones
    top, tokens = jax.jit(top_in_blocks, static_argnums=1)(values, CANDIDATES)
    want, at = jax.lax.top_k(values, CANDIDATES)
    np.testing.assert_array_equal(top, want)
    np.testing.assert_array_equal(tokens, at)
    order = np.argsort(-values, axis=-1, kind="stable")[:, :CANDIDATES]
    np.testing.assert_array_equal(tokens, order)


@pytest.mark.parametrize("rows", [8, 16])
def test_the_most_probable_on_a_mesh(rows):
    values = np.random.default_rng(0).integers(0, 90, (rows, 20_001)).astype(np.float32)
    with jax.set_mesh(make_mesh(data=8)):
        placed = place(jnp.asarray(values), ("batch", None))
        top, tokens = jax.jit(top_in_blocks, static_argnums=1)(placed, CANDIDATES)
    want, at = jax.lax.top_k(values, CANDIDATES)
    np.testing.assert_array_equal(top, want)
    np.testing.assert_array_equal(tokens, at)


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_a_nucleus_whose_mass_is_exactly_top_p_has_no_token_more(kept):
    """Four tokens have a probability of 1/4 each."""
    logits = np.full(V, -1e9)
    logits[[5, 9, 300, 800]] = 1.5
    found = draw(logits, temperature=1.0, top_p=kept / 4)
    assert sorted(set(found.tolist())) == [5, 9, 300, 800][:kept]


def test_a_draw_does_not_depend_on_the_neighbours_path():
    logits = np.where(np.arange(DRAWS)[:, None] % 2 == 0, STEEP, FLAT)
    mixed = draw(logits, temperature=1.0, top_p=0.9)
    np.testing.assert_array_equal(mixed[::2], draw(STEEP, temperature=1.0, top_p=0.9)[::2])
    np.testing.assert_array_equal(mixed[1::2], draw(FLAT, temperature=1.0, top_p=0.9)[1::2])
    warm = np.where(np.arange(DRAWS) % 3 == 0, 0.0, 1.0)  # some rows are greedy
    some = draw(logits, temperature=warm, top_p=0.9)
    np.testing.assert_array_equal(some[warm > 0], mixed[warm > 0])
    np.testing.assert_array_equal(some[warm == 0], logits.argmax(-1)[warm == 0])


def test_uniforms_are_uniform_and_keyed():
    def rows(seed, first, place):
        n = 20_000
        return np.asarray(uniforms(jnp.full(n, seed, jnp.uint32),
                                   jnp.arange(first, first + n, dtype=jnp.uint32),
                                   jnp.full(n, place, jnp.int32)))

    base = rows(0, 0, 5)
    assert stats.kstest(base, "uniform").pvalue > 1e-3 and (base >= 0).all() and (base < 1).all()
    np.testing.assert_array_equal(rows(0, 100, 5)[:100], base[100:200])
    for other in (rows(1, 0, 5), rows(0, 0, 6)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.03
    assert not s.same_bits(base, rows(1, 0, 5))
    # Row r at position p and row r + 1 at position p − 1 have different draws, so they are not
    # summed.
    here, there = rows(0, 7, 5), rows(0, 8, 4)
    assert abs(np.corrcoef(here, there)[0, 1]) < 0.03 and (here != there).mean() > 0.99


def words(*values):
    return tuple(jnp.asarray([value], jnp.uint32) for value in values)


@pytest.mark.parametrize(("key", "count", "wanted"), [  # known answers of Random123 (kat_vectors)
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0))])
def test_the_generator_is_threefry(key, count, wanted):
    found = module._threefry(words(*key), words(*count))
    assert tuple(int(word[0]) for word in found) == wanted


def test_draws_depend_on_no_flag_of_jax():
    """JAX's default generator, partitionable keys and 64-bit mode do not change draws."""
    def drawn():
        at = jnp.asarray([3, 2**31 - 1, 0, 77], jnp.int32)
        rows = jnp.asarray([1, 2, 2**32 - 1, 0], jnp.uint32)
        seed = jnp.asarray([0, 9, 2**32 - 1, 5], jnp.uint32)
        return np.asarray(jax.jit(lambda *x: uniforms(*x))(seed, rows, at))

    wanted = drawn()
    for flag, value in (("jax_default_prng_impl", "rbg"), ("jax_default_prng_impl", "unsafe_rbg"),
                        ("jax_threefry_partitionable", False), ("jax_enable_x64", True)):
        before = getattr(jax.config, flag)
        jax.config.update(flag, value)
        try:
            np.testing.assert_array_equal(drawn(), wanted, flag)
        finally:
            jax.config.update(flag, before)
    assert wanted.dtype == np.float32


def test_the_draws_of_earlier_runs_stay():
    """The bits of three draws equal those of JAX's Threefry with the flags of version 0.10."""
    found = np.asarray(uniforms(*(jnp.asarray([0, 1, 2**32 - 1], jnp.uint32) for _ in range(2)),
                                jnp.asarray([0, 17, 2**31 - 1], jnp.int32)))
    np.testing.assert_array_equal(found.view(np.uint32), EARLIER)


def test_every_seed_row_and_position_has_a_draw_of_its_own():
    """Different combinations have different draws, even if their sums are equal."""
    seed, row, place = (x.ravel() for x in np.mgrid[:20, :20, :20])
    found = np.asarray(uniforms(jnp.asarray(seed, jnp.uint32), jnp.asarray(row, jnp.uint32),
                                jnp.asarray(place, jnp.int32)))
    # 8,000 draws from 2^23 values: about four pairs coincide by chance
    assert np.unique(found).size > found.size - 30


def test_settings_are_spread_over_rows_and_taken_by_row():
    """The largest valid values keep their values and get fixed dtypes."""
    made = sampling(3, temperature=[0.0, 0.5, 3.4e38], top_p=1, top_k=[0, 256, 1],
                    seed=[2**32 - 1, 0, 7])
    assert [x.dtype.name for x in (made.temperature, made.top_p, made.top_k, made.seed)] == [
        "float32", "float32", "int32", "uint32"]
    assert made.top_p.tolist() == [1.0] * 3 and made.seed.tolist() == [2**32 - 1, 0, 7]
    some = made.take([2, -1, 1])  # padding has the settings of the first row
    assert some.top_k.tolist() == [1, 0, 256] and some.seed.tolist() == [7, 2**32 - 1, 0]


@pytest.mark.parametrize(("settings", "message"), [
    ({"temperature": -0.5}, "temperature is -0.5; it must be at least 0, and finite in float32"),
    ({"top_p": 1.01}, r"top_p is 1.01; it must be in \(0, 1\]"),
    ({"top_k": 257}, r"top_k is 257; it must be an integer in 0…256 \(0: no limit\)"),
    ({"seed": 2**32}, "seed is 4294967296; it must be an integer in 0…2³²−1"),
    ({"seed": [1, 2]}, r"seed has shape \(2,\); it must be a number or have shape \[3\]"),
    ({"top_p": np.ones((3, 1))}, r"top_p has shape \(3, 1\)"),
    ({"seed": jax.random.key(0)}, "give a number such as seed=0, not a key"),
    ({"top_k": jax.random.key(0)}, "top_k is .*; give a number$"),
    ({"top_k": True}, "top_k is True"),
])
def test_a_setting_out_of_range_is_named_with_its_range(settings, message):
    """Each message has the setting, its value and the valid values."""
    with pytest.raises(ValueError, match=message):
        sampling(3, **settings)


def test_on_an_accelerator_only_large_vocabularies_are_searched_in_blocks(monkeypatch):
    """Up to 64 times as many tokens as candidates, a plain top-k is used."""
    monkeypatch.setattr(module, "on_cpu", lambda *_: False)
    monkeypatch.setattr(module, "top_in_blocks", lambda *_: "blocks")
    assert module.most_probable(jnp.zeros((1, 2 * 8 * 32)), 8)[0].shape == (1, 8)
    assert module.most_probable(jnp.zeros((1, 2 * 8 * 32 + 1)), 8) == "blocks"
    monkeypatch.setattr(module, "on_cpu", lambda *_: True)
    assert module.most_probable(jnp.zeros((1, 9000)), 8)[0].shape == (1, 8)
