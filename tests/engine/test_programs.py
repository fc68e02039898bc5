"""The cache of compiled programs: its size, eviction order, and platform."""

from __future__ import annotations

import gc
import os
import pathlib
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.distributed import sharding
from jaxpersona.engine import compiled
from jaxpersona.engine.compiled import KEPT, program
from jaxpersona.engine.generate import generate
from jaxpersona.engine.programs import TRACES
from jaxpersona.models import prepared


@pytest.fixture
def few(monkeypatch):
    """Limit the cache to three programs and clear it."""
    KEPT.clear()
    monkeypatch.setattr(KEPT, "limit", 3)
    yield
    KEPT.clear()


def counted():
    seen = []

    @program(static=("times",))
    def double(x, y, *, times):
        seen.append(y.shape)
        return y * times

    return double, seen


def test_the_least_recently_used_is_dropped(few):
    double, seen = counted()

    def call(n):
        np.testing.assert_array_equal(double(jnp.ones(2), jnp.ones(n), times=2.0), 2.0)

    for n in (1, 2, 3, 1, 4):  # the fourth shape evicts the second, which was used least recently
        call(n)
    assert seen == [(1,), (2,), (3,), (4,)] and len(KEPT) == 3
    call(1), call(3), call(4)
    assert len(seen) == 4
    call(2)
    assert seen[4:] == [(2,)]


def test_new_values_never_trace_again_and_static_ones_do(few):
    double, seen = counted()
    for value in (1.0, 2.0):
        double(jnp.ones(2), jnp.full(3, value), times=2.0)
    assert len(seen) == 1
    double(jnp.ones(2), jnp.ones(3), times=3.0)
    assert len(seen) == 2


def test_what_is_dropped_is_freed(few):
    double, _ = counted()
    double(jnp.ones(2), jnp.ones(1), times=2.0)
    (made,) = KEPT._held.values()
    gone = weakref.ref(made)
    del made
    for n in (2, 3, 4):
        double(jnp.ones(2), jnp.ones(n), times=2.0)
    gc.collect()
    assert gone() is None


def test_generating_stays_within_the_bound_and_keeps_its_bits(few, monkeypatch):
    model = s.tiny_model()
    texts = s.prompts((5, 70))

    def reply():
        return generate(model, texts, max_new_tokens=4, batch_size=2).tokens

    kept = reply()
    assert len(KEPT) <= 3
    before = TRACES["decode"]
    assert s.same_bits(reply(), kept) and TRACES["decode"] > before  # evicted and compiled again
    monkeypatch.setattr(KEPT, "limit", compiled.LIMIT)
    reply()
    before = dict(TRACES)
    assert s.same_bits(reply(), kept) and dict(TRACES) == before


def test_the_limit_is_read_from_the_environment(monkeypatch):
    monkeypatch.setenv(compiled.SWITCH, "12")
    assert compiled._limit() == 12
    for said in ("0", "-3", "many", "1.5"):
        monkeypatch.setenv(compiled.SWITCH, said)
        with pytest.raises(ValueError, match=f"{compiled.SWITCH} is '{said}'; it must be"):
            compiled._limit()


def test_the_default_limit_drops_programs_and_says_so(monkeypatch, caplog):
    """Without the environment variable, the limit is that of docs/limits.md."""
    monkeypatch.delenv(compiled.SWITCH, raising=False)
    kept, limit = compiled.Kept(), compiled.LIMIT
    assert kept.limit is None and 0 < limit <= 100  # a program takes about 20 MB
    with caplog.at_level("INFO", logger="jaxpersona"):
        for key in range(limit):
            kept.get(key, lambda key=key: [key])
        assert kept.limit == len(kept) == limit and not caplog.records
        kept.get(0, list)  # used again, so 1 is now the least recently used
        for key in (limit, limit + 1):
            kept.get(key, lambda key=key: [key])
    assert len(kept) == limit and list(kept._held)[:2] == [3, 4]
    assert kept.get(0, list) == [0]
    assert [record.getMessage() for record in caplog.records] == 2 * [
        f"more than {limit} compiled programs are in memory; the least recently used one is freed "
        f"and recompiled on its next use ({compiled.SWITCH} sets the limit)"]
    page = (pathlib.Path(__file__).parents[2] / "docs" / "limits.md").read_text()
    assert f"The {limit} most recently used compiled programs are kept in memory" in page
    assert f"`{compiled.SWITCH}` sets another number" in " ".join(page.split())


@pytest.fixture
def gpu_host(monkeypatch):
    """Set JAX's default backend to "gpu", while all arrays remain on CPUs."""
    KEPT.clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    yield
    KEPT.clear()


def test_arrays_on_a_cpu_are_known_on_a_gpu_host(gpu_host):
    """Platform-dependent choices follow the platform of the arrays, also in traced programs."""
    from jaxpersona.models.cache import kept_dtype

    model = s.tiny_model()
    x = model.params.embed_vd
    assert sharding.platform(x) == "cpu" and sharding.on_cpu(x)
    assert kept_dtype(x.astype(jnp.bfloat16)) == jnp.float32
    assert prepared.fast_params(model, 8) is not model.params
    assert sharding.default_platform() == "gpu"
    inside = []

    @program()
    def traced(x):
        inside.append((sharding.platform(x), sharding.on_cpu(x)))
        return x

    traced(x)
    assert inside == [("cpu", True)]
    jax.jit(lambda x: inside.append(sharding.platform(x)) or x)(x)
    assert inside[1:] == ["gpu"]  # without a platform set, the default is used


def test_a_long_prompt_on_a_cpu_does_not_ask_for_cudnn(gpu_host, recwarn):
    model = s.tiny_model(dtype=jnp.bfloat16, head_dim=16, max_context=1024)
    long = s.prompts((600,))
    generate(model, long, max_new_tokens=1, batch_size=1)
    jp.forward(model.params, model.config, jp.batch(long), attention="auto", logits="last")
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_a_batch_of_extract_fits_the_arrays_platform(gpu_host):
    found = jp.extract(s.tiny_model(), s.prompts((5, 7)), capture=jp.capture.last())
    assert found.padded == 1024  # one batch of that many tokens, as on a CPU


def test_the_default_dtype_is_that_of_the_place_of_the_parameters(gpu_host):
    from jaxpersona.ckpts.loading import _default_dtype

    assert _default_dtype(None).name == "bfloat16"
    assert _default_dtype(sharding.make_mesh(2)).name == "float32"
    with jax.default_device(jax.devices("cpu")[1]):
        assert _default_dtype(None).name == "float32"
        assert sharding.default_device() == jax.devices("cpu")[1]


def test_a_wrong_limit_is_an_error_of_the_call_and_not_of_the_import():
    code = ("import jaxpersona as jp\n"
            "try:\n    jp.generate(jp.load('mini'), ['hi'], max_new_tokens=1)\n"
            "except ValueError as error:\n    print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          timeout=200, env={**os.environ, compiled.SWITCH: "many"})
    assert done.stdout.startswith(f"{compiled.SWITCH} is 'many'; it must be"), done.stderr[-500:]


def test_what_explains_activations_is_among_the_kept_programs(few):
    """A single `jax.jit` would cache one program for each row width."""
    from jaxpersona.engine import nonfinite
    from jaxpersona.interventions import Interventions
    from jaxpersona.text.chat import Row

    model = s.tiny_model()
    for width in (5, 40, 70, 140, 300):
        tokens = np.array(s.prompts((width,))[0], np.int32)
        row = Row(tokens, np.full(width, 16, np.int32), np.zeros(width, np.int32), "")
        assert nonfinite.first_site(model, row, Interventions()) is None
    assert len(KEPT) == 3
