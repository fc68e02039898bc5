"""Runtime context: JAX debugging flags, transfer guards and forked processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona import runtime
from jaxpersona.captures import capture
from jaxpersona.engine import programs
from jaxpersona.interventions.where import everywhere

MODEL = s.tiny_model(stop_ids=(3, 7))
ROWS = s.prompts((5, 9, 4), seed=2)
V = np.random.default_rng(0).normal(size=(3, 32))
SETTINGS = {
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "transfer_guard": lambda: jax.transfer_guard("disallow"),
    "transfer_guard_explicit": lambda: jax.transfer_guard("disallow_explicit"),
}


def everything():
    """Call every constructor, and run generate and extract with every capture."""
    named = jp.Vector(V)
    edits = jp.chain(
        jp.steer(V[:2], layers=[1], scale=0.5, rows=[0, -1, 1]),
        jp.cap(named, layers=[0, 2], floor=0.5), jp.cap(V[0], layers=[1], ceiling=np.inf),
        jp.ablate(V[0], layers=[2]), jp.mean_ablate(V[0], V[1], layers=[2]),
        jp.scale(V[1], 0.5, layers=[2]), jp.set_projection(V[1], 1.0, layers=[2]),
        jp.rotate(V[0], V[1], layers=[2], by=0.1),
        jp.gate(jp.cap(V[0], layers=[2], floor=1.0), V[0], layer=1, above=-np.inf),
        jp.restore_norm(layers=[2]))
    jp.stack_rows([jp.cap(V[0], layers=[1], floor=1.0)] * 2, into=jp.reserve(2, 32, [1]))
    read = (capture.mean(everywhere) | capture.last(everywhere) | capture.norms() | capture.full()
            | capture.projections(named) | capture.moments(V, everywhere)
            | capture.histogram(V, [0.0, 1.0]))
    out = jp.generate(MODEL, ROWS, interventions=edits, capture=read, max_new_tokens=6,
                      batch_size=4, temperature=[0.0, 1.0, 1.0])
    found = jp.extract(MODEL, ROWS, interventions=edits, capture=read)
    return out.tokens, out.captured, found.captured, out.applied


@pytest.fixture(scope="module")
def plain():
    return everything()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_of_jax_changes_no_bit_and_no_program(setting, plain):
    before = dict(programs.TRACES)
    with SETTINGS[setting]():
        found = everything()
    assert s.differing(found, plain) == []
    assert dict(programs.TRACES) == before


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_model_is_loaded_under_a_setting_of_jax(setting):
    with SETTINGS[setting]():
        model = jp.load("mini")
    assert model.fingerprint == jp.load_axis("mini").fingerprint


def test_a_setting_of_jax_holds_again_after_a_call():
    with jax.debug_nans(True), jax.transfer_guard("disallow"):
        with contextlib.suppress(ValueError):
            jp.steer(V[0], layers=[1], scale=np.nan)
        assert jax.config.jax_debug_nans
        with pytest.raises(Exception, match="Disallowed host-to-device"):
            jax.numpy.asarray(np.ones(3))
    with jax.debug_infs(True):
        jp.load("mini")
        assert jax.config.jax_debug_infs


def test_a_setting_that_the_user_has_chosen_stays(monkeypatch):
    """Only JAX's default is changed, and it is restored if the block fails."""
    name = "jax_cpu_enable_async_dispatch"
    before = runtime.setting(name)
    try:
        jax.config.update(name, False)
        with runtime.default_setting(name, True, default=True):
            assert runtime.setting(name) is False
        jax.config.update(name, True)
        monkeypatch.setenv(name.upper(), "1")
        with runtime.default_setting(name, False, default=True):
            assert runtime.setting(name) is True
        monkeypatch.delenv(name.upper())
        with pytest.raises(KeyError), runtime.default_setting(name, False, default=True):
            assert runtime.setting(name) is False
            raise KeyError
        assert runtime.setting(name) is True
        with runtime.default_setting(name, False, default=True):
            pass
        assert runtime.setting(name) is False
    finally:
        jax.config.update(name, before)
    assert runtime.setting("jax_no_such_setting") is None


def test_a_user_s_debugging_is_known_while_it_is_disabled():
    for flag in (jax.debug_nans, jax.debug_infs):
        with flag(True), runtime.own_rules(), runtime.own_rules():
            assert runtime.debugging()
            assert not jax.config.jax_debug_nans and not jax.config.jax_debug_infs
        assert not runtime.debugging()
    with runtime.own_rules(), jax.debug_nans(True):
        assert not runtime.debugging()  # set by this package, not by the user


def test_a_setting_that_may_change_a_trace_is_part_of_its_key():
    before = runtime.tracing_settings()
    assert not [name for name, _ in before if name.startswith(("jax_log", "jax_compilation_cache"))]
    with jax.default_matmul_precision("float32"):
        assert dict(runtime.tracing_settings())["jax_default_matmul_precision"] == "'float32'"
    with jax.log_compiles(True):
        assert runtime.tracing_settings() == before


def test_a_tracer_is_found_in_any_tree():
    seen = []
    jax.jit(lambda x: seen.append(runtime.is_traced({"a": (1.0, x)}, None)) or x)(np.ones(2))
    assert seen == [True]
    assert not runtime.is_traced(np.ones(2), {"a": jax.numpy.ones(2)}, None, "text")


def test_a_platform_that_the_user_has_chosen_stays():
    """`jaxpersona plan` selects the CPU only if no platform is set."""
    before = runtime.setting("jax_platforms")
    try:
        jax.config.update("jax_platforms", "cpu")
        with runtime.default_setting("jax_platforms", "rocm"):
            assert runtime.setting("jax_platforms") == "cpu"
    finally:
        jax.config.update("jax_platforms", before)


FORK = """
import os, sys, warnings
warnings.simplefilter("ignore")
import jaxpersona as jp
{before}
for inside in {inside}:
    child = os.fork()
    if not child:
        try:
            exec(inside)
            print("worked", flush=True)
        except ValueError as error:
            print(error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


USES_OF_JAX = (
    'jp.generate(model, ["hi"], max_new_tokens=2)', 'jp.extract(model, ["hi"])',
    'jp.load("mini")', "jp.cap([1.0] * 128, layers=[1], floor=1.0)",
    "from jaxpersona.training import learn; learn.fit(model, None, None, [], steps=1)",
    "from jaxpersona.planning import plan; plan.plan(model.config, 'h200:8')")


def test_a_child_of_a_process_that_used_jax_is_refused():
    lines = fork('model = jp.load("mini")', USES_OF_JAX).splitlines()
    assert len(lines) == len(USES_OF_JAX)
    assert all("was forked from" in line and "'spawn'" in line for line in lines), lines


def test_a_child_of_a_process_that_did_not_is_fine():
    assert fork("", ['jp.cap([1.0] * 128, layers=[1], floor=1.0)']).strip() == "worked"


def fork(before, inside):
    code = FORK.format(before=before, inside=inside)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_settings_of_logs_and_files_are_no_part_of_the_key_of_a_trace():
    """They change no program; the settings of numbers and random keys may."""
    names = {name for name, _ in runtime.tracing_settings()}
    assert names >= {"jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl",
                     "jax_numpy_dtype_promotion"}
    for start in ("jax_log", "jax_logging", "jax_debug_log", "jax_compilation_cache",
                  "jax_persistent_cache", "jax_platforms", "jax_traceback", "jax_dump",
                  "jax_explain", "jax_raise_persistent_cache", "jax_enable_compilation_cache",
                  "jax_distributed"):
        assert not [name for name in names if name.startswith(start)], start
    assert [name for name, _ in runtime.tracing_settings()] == sorted(names)


def test_settings_of_a_thread_have_a_fixed_order():
    """One value changes with one setting."""
    before = runtime.thread_settings()
    with jax.default_matmul_precision("float32"):
        inside = runtime.thread_settings()
    changed = [i for i, (a, b) in enumerate(zip(before, inside, strict=True)) if a != b]
    assert [list(jax.config.values)[i] for i in changed] == ["jax_default_matmul_precision"]
    assert runtime.thread_settings() == before


def test_a_process_is_known_by_its_own_number(monkeypatch):
    """The first call records it; in another process, the message names both."""
    monkeypatch.setattr(runtime, "_used_by", None)
    runtime.check_process()
    assert runtime._used_by == os.getpid()
    runtime.check_process()
    monkeypatch.setattr(runtime, "_used_by", 1)
    with pytest.raises(jp.UserError, match=rf"process {os.getpid()} was forked from process 1, wh"):
        runtime.check_process()
