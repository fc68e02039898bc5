"""Stored traces: a second process traces nothing, and only an equal program is found."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.captures.capture import Capture
from jaxpersona.engine import compile_cache, compiled, stored
from jaxpersona.engine.compiled import KEPT, program
from jaxpersona.engine.generate import generate
from jaxpersona.engine.own_folder import OwnFolder
from jaxpersona.engine.programs import TRACES
from jaxpersona.engine.stored import Unknown, described_value
from jaxpersona.models.config import replace

pytest.importorskip("flatbuffers")


@pytest.fixture(scope="module")
def model():
    return s.tiny_model()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Traces are stored in a new folder; programs in memory are dropped before and after."""
    own = OwnFolder(tmp_path / "traces", 2**26)
    monkeypatch.setattr(compiled, "traces", lambda: own)
    KEPT.clear()
    yield own
    KEPT.clear()


def reply(model, scale=2.0, **settings):
    v = np.random.default_rng(0).normal(size=model.config.d_model)
    out = generate(model, s.prompts((5, 9)), max_new_tokens=4, batch_size=2,
                   interventions=jp.steer(v, layers=[1], scale=scale),
                   capture=jp.capture.mean(jp.where.everywhere), **settings)
    return [out.tokens, out.captured["mean"], out.applied]


def test_a_program_that_is_dropped_traces_nothing_and_has_equal_bits(model, folder):
    before = dict(TRACES)
    made = reply(model)
    first = {name: TRACES[name] - before.get(name, 0) for name in ("prefill", "decode")}
    assert first == {"prefill": 1, "decode": 1}
    assert len(list(folder.path.iterdir())) == 4  # and the programs that write and take rows
    before = dict(TRACES)
    KEPT.clear()
    assert s.same_bits(reply(model), made) and dict(TRACES) == before
    other = reply(model, scale=3.0, temperature=0.0)
    assert dict(TRACES) == before and not s.same_bits(other, made)  # values are no part of it
    KEPT.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "traces", lambda: None)
        assert s.same_bits(reply(model), made) and dict(TRACES) != before


@pytest.mark.slow
def test_readings_of_other_names_keep_their_names_and_values(model, folder):
    """The programs that take rows have arguments of equal shapes for all of them."""
    where = {"a": jp.where.everywhere.without("first"), "b": jp.where.everywhere,
             "c": jp.where.prompt}

    def read(*names):
        captures = [jp.capture.mean(where[name], name=name) for name in names]
        return generate(model, s.prompts((5, 9)), max_new_tokens=4, batch_size=2,
                        capture=captures).captured

    alone = {name: read(name)[name] for name in where}
    for names in (("a", "b"), ("b", "c"), ("a", "c")):
        found = read(*names)
        assert set(found) == set(names)
        for name in names:
            np.testing.assert_allclose(found[name], alone[name], rtol=1e-5, atol=1e-6)


def test_the_same_shapes_in_another_structure_are_another_program(folder):
    @program(result=lambda y, x: x)
    def add(y, x):
        return {name: value + y for name, value in x.items()}

    y = jnp.ones(2)
    for names in (("a", "b"), ("b", "c"), ("a",)):
        out = add(y, {name: jnp.full(2, at) for at, name in enumerate(names)})
        assert {k: v.tolist() for k, v in out.items()} == {
            name: [at + 1.0] * 2 for at, name in enumerate(names)}


@pytest.fixture
def counted(folder):
    """A stored program of this package, and the number of its traces."""
    seen = []

    @program(static=("times",), donate=("x",), result=lambda x, **_: x)
    def double(y, x, *, times):
        seen.append(x["a"].shape)
        return {"a": x["a"] * times + y, "b": x["b"]}

    def call(n=3, times=2.0, y=1.0):
        out = double(jnp.full((n,), y), {"b": jnp.ones(2), "a": jnp.ones(n)}, times=times)
        np.testing.assert_array_equal(out["a"], times + y)
        np.testing.assert_array_equal(out["b"], 1.0)
        return len(seen)

    return call


def test_only_the_leaves_of_donated_arguments_are_donated(folder):
    def move(state, a, b, c=None):
        return jax.tree.map(lambda x: x + a[0] + a[1], (state, b))

    call = program(donate=("state", "b"), result=lambda state, a, b, c=None: (state, b))(move)
    for i in range(3):  # the first call reads the trace; later calls are dispatched by JAX
        one, two, a, b = (jnp.full((64, i + 1), float(n)) for n in range(4))
        state, moved = call({"x": one, "y": [two]}, (a, a), b)
        assert [x.is_deleted() for x in (one, two, a, b)] == [True, True, False, True]
        np.testing.assert_array_equal(state["y"][0], 5.0)
        np.testing.assert_array_equal(moved, 7.0)
    assert len(list(folder.path.glob("*.trace"))) == 3


def test_shapes_and_static_values_have_their_own_traces(counted):
    assert [counted(), counted(y=5.0), counted(4), counted(times=3.0)] == [1, 1, 2, 3]
    KEPT.clear()
    assert [counted(), counted(4), counted(times=3.0)] == [3, 3, 3]


def test_another_version_source_setting_or_device_traces_anew(counted, monkeypatch):
    assert counted() == 1
    changes = (
        (stored, "_VERSIONS", ("0.0",)),
        (stored, "_source", lambda: "x"),
        (stored, "tracing_settings", lambda: (("jax_enable_x64", "True"),)),
        (stored, "get_backend", lambda _: type("Backend", (), {"platform_version": "x"})),
    )
    for at, (module, name, value) in enumerate(changes, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, value)
            KEPT.clear()
            assert counted() == at, name
    KEPT.clear()
    assert counted() == len(changes) + 1


def test_another_setting_of_jax_gives_another_program(counted):
    assert counted() == 1
    with jax.default_matmul_precision("highest"):
        assert [counted(), counted()] == [2, 2]
    assert counted() == 2
    with jax.disable_jit():
        assert counted() == 3  # single operations


def test_settings_of_jax_are_part_of_the_key():
    from jaxpersona.runtime import tracing_settings

    plain = tracing_settings()
    with jax.default_matmul_precision("highest"):
        assert tracing_settings() != plain
    with jax.enable_x64(True):
        assert tracing_settings() != plain
    assert tracing_settings() == plain
    assert not any("cache_dir" in name for name, _ in plain)


def test_a_damaged_trace_is_made_again(counted, folder, caplog):
    counted()
    (path,) = folder.path.iterdir()
    kept = path.read_bytes()
    for damage in (b"", kept[:-5], kept[:200] + b"!" + kept[201:]):
        path.write_bytes(damage)
        before = counted()
        KEPT.clear()
        assert counted() == before + 1 and "damaged" in caplog.text
        assert path.read_bytes()[:40] == kept[:40] or path.stat().st_size == len(kept)
        caplog.clear()
    folder.write(path.name, b"no trace at all")
    before = counted()
    KEPT.clear()
    assert counted() == before + 1 and "cannot be read" in caplog.text


def test_traced_arguments_and_other_devices_use_jit(counted, folder):
    @program(result=lambda x: x)
    def plus(x):
        return x + 1

    assert float(jax.jit(lambda x: plus(x))(jnp.float32(1))) == 2
    assert not folder.path.exists()
    there = jax.device_put(jnp.ones(3), jax.devices()[1])
    assert plus(there).devices() == {jax.devices()[1]} and not folder.path.exists()
    assert plus.lower(jnp.ones(3)).as_text()


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_arrays_elsewhere_do_not_use_the_trace_of_an_earlier_call(kind, folder):
    """After calls that JAX dispatches, arrays of the same shapes on other devices use `jit`."""
    @program(result=lambda x, y: x)
    def plus(x, y):
        return x + y

    here, plain = jnp.ones(8), np.ones(8, np.float32)
    for y in (here, here, plain):
        assert plus(here, y).devices() == {jax.devices()[0]}
    assert len(list(folder.path.glob("*.trace"))) == 1
    spread = jax.device_put(here, jax.NamedSharding(
        jax.make_mesh((4,), ("a",), axis_types=(kind,)), jax.P("a")))
    there = jax.device_put(here, jax.devices()[3])
    for x, y in ((spread, spread), (here, spread), (there, there), (here, there)):
        out = plus(x, y)
        np.testing.assert_array_equal(out, 2.0)
        assert out.devices() == y.devices()
    assert plus(here, here).devices() == {jax.devices()[0]}
    assert len(list(folder.path.glob("*.trace"))) == 1


def test_a_result_of_another_structure_is_not_stored(folder):
    @program(result=lambda x: (x, x))
    def one(x):
        return x * 2

    np.testing.assert_array_equal(one(jnp.ones(3)), 2.0)
    assert not folder.path.exists() or not list(folder.path.iterdir())


def test_a_users_mistake_in_a_trace_is_raised(folder):
    @program(result=lambda x: x)
    def wrong(x):
        raise jp.UserError("x is wrong; give another")

    with pytest.raises(jp.UserError, match="give another"):
        wrong(jnp.ones(3))


class Foreign(flax.struct.PyTreeNode):
    x: int = flax.struct.field(pytree_node=False, default=1)


def test_descriptions_are_equal_for_equal_values_only(model):
    config = model.config
    values = [config, replace(config, norm_eps=1e-4), replace(config, windows=(4,) + (None,) * (
        config.n_layers - 1)), 1, 1.0, True, "1", b"1", None, (1,), [1], {"a": 1}, {"b": 1},
        np.zeros(2, np.int32), np.zeros(2, np.uint32), jnp.zeros((2, 1)), jnp.float32,
        np.dtype(np.float32), range(3), range(4), Capture(),
        jp.capture.mean(jp.where.everywhere), jp.capture.mean(jp.where.everywhere, layers=[0])]
    told = [repr(described_value(value)) if not isinstance(value, type(jnp.float32)) else "skip"
            for value in values]
    assert len(set(told)) == len(values)
    assert told[0] == repr(described_value(dataclasses.replace(config)))
    assert described_value(jnp.zeros(2)) == described_value(np.ones(2, np.float32))


@pytest.mark.parametrize("value", [Foreign(), lambda x: x, object(), {1, 2}, np.sum],
                         ids=["class", "function", "object", "set", "library"])
def test_what_has_no_exact_description_is_not_stored(value):
    with pytest.raises(Unknown):
        described_value({"x": [value]})


CODE = """
import json, jaxpersona as jp
from jaxpersona.engine.programs import TRACES
model = jp.load("random:qwen3-mini")
out = jp.generate(model, [[5, 6, 7]], max_new_tokens=5, batch_size=1)
print(json.dumps([out.tokens[0].tolist(), dict(TRACES)]))
"""


def test_a_second_process_traces_nothing(tmp_path):
    env = {k: v for k, v in os.environ.items()
           if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", compile_cache.SWITCH)}
    env["XDG_CACHE_HOME"] = str(tmp_path)

    def run():
        done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True,
                              timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    (tokens, traced), (again, none) = run(), run()
    assert traced == {"prefill": 1, "decode": 1} and none == {} and again == tokens
    (own,) = (tmp_path / "jaxpersona").iterdir()
    for path in (tmp_path / "jaxpersona", own, own / "traces"):
        assert path.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def no_cache():
    """JAX has no folder for executables."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_folder_that_others_may_write_is_not_used(no_cache, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(compile_cache.SWITCH)
    (tmp_path / "jaxpersona").mkdir()
    (tmp_path / "jaxpersona").chmod(0o777)
    assert compile_cache.use_compile_cache() is None and compile_cache.traces() is None
    assert jax.config.jax_compilation_cache_dir is None
    assert "compiled programs are not stored" in caplog.text and "is writable" in caplog.text


def test_without_the_compilation_cache_there_are_no_traces(no_cache, monkeypatch):
    monkeypatch.delenv(compile_cache.SWITCH)
    assert compile_cache.traces() is None
