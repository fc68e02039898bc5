"""The folder of compiled programs: the user's cache folder, unless the environment overrides it."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

CODE = ("import jax, jaxpersona as jp, jax.numpy as jnp; jp.load('random:qwen3-mini'); "
        "c = jax.config; print(c.jax_compilation_cache_max_size, "
        "c.jax_persistent_cache_min_compile_time_secs, c.jax_compilation_cache_dir)")


def chosen(home: pathlib.Path, **variables: str) -> list[str]:
    """Return the size limit, the least seconds of a compilation, and the folder."""
    drop = ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR", "JAXPERSONA_COMPILE_CACHE", "XLA_FLAGS")
    env = {k: v for k, v in os.environ.items() if k not in drop}
    done = subprocess.run([sys.executable, "-c", CODE], env={**env, "HOME": str(home), **variables},
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1500:]
    return done.stdout.split()[-3:]


def test_without_a_home_nothing_is_kept(monkeypatch):
    """Containers may run as a user without a home directory."""
    import jax

    from jaxpersona.engine import compile_cache

    def homeless() -> pathlib.Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", homeless)
    for name in ("XDG_CACHE_HOME", compile_cache.SWITCH):
        monkeypatch.delenv(name, raising=False)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert compile_cache.use_compile_cache() is None
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(("variables", "expected"), [
    pytest.param({}, "{home}/.cache/jaxpersona/", marks=pytest.mark.slow),
    ({"XDG_CACHE_HOME": "{home}/x"}, "{home}/x/jaxpersona/"),
    pytest.param({"JAX_COMPILATION_CACHE_DIR": "{home}/mine"}, "{home}/mine",
                 marks=pytest.mark.slow),
    ({"JAXPERSONA_COMPILE_CACHE": "0"}, "None"),
], ids=["default", "xdg", "own", "off"])
def test_the_folder(tmp_path, variables, expected):
    given = {k: v.format(home=tmp_path) for k, v in variables.items()}
    size, seconds, folder = chosen(tmp_path, **given)
    assert folder.startswith(expected.format(home=tmp_path))
    limited = "jaxpersona" in expected  # the user's own folder keeps JAX's defaults
    assert (size, seconds) == (("4294967296", "0.05") if limited else ("-1", "1.0"))
    if not variables:
        assert list(tmp_path.rglob("*")), "the cache is empty"


def test_a_processor_described_in_any_encoding_has_a_folder(tmp_path):
    from jaxpersona.engine.compile_cache import _processor

    described = tmp_path / "cpuinfo"
    described.write_bytes(b"model name\t: \xe9\xff\nflags\t\t: fpu vme\n")
    named = _processor(str(described))
    described.write_bytes(b"model name\t: x\nflags\t\t: fpu vme\n")
    assert named == _processor(str(described)) != _processor(str(tmp_path / "none"))


def test_the_instruction_set_of_a_processor_is_read_from_its_first_flags(tmp_path, monkeypatch):
    """x86 processors list "flags", ARM processors "Features"."""
    import hashlib

    from jaxpersona.engine import compile_cache

    monkeypatch.setattr(compile_cache.platform, "machine", lambda: "m1")
    monkeypatch.setattr(compile_cache.platform, "processor", lambda: "other")
    for content, line in (("model name\t: x\nFeatures\t: fp asimd\nFeatures\t: sve\n",
                           "Features\t: fp asimd"), ("a\nflags\t: fpu\n", "flags\t: fpu"),
                          ("no such line\n", "other")):
        (tmp_path / "cpuinfo").write_text(content)
        wanted = hashlib.sha256(line.encode()).hexdigest()[:8]
        assert compile_cache._processor(str(tmp_path / "cpuinfo")) == f"m1-{wanted}"


def test_traces_have_a_folder_and_a_limit_of_their_own(tmp_path, monkeypatch):
    """Without JAX's compilation cache, or if it is switched off, there are none."""
    from jaxpersona.engine import compile_cache

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compile_cache, "setting", lambda name: "/elsewhere")
    monkeypatch.setattr(compile_cache, "_processor", lambda: "cpu")
    monkeypatch.setenv(compile_cache.SWITCH, "1")
    found = compile_cache.traces()
    assert (found.path, found.limit) == (tmp_path / "jaxpersona" / "cpu" / "traces", 268_435_456)
    assert compile_cache.use_compile_cache() == "/elsewhere"  # the user's own folder
    monkeypatch.setenv(compile_cache.SWITCH, "0")
    assert compile_cache.traces() is None and compile_cache.use_compile_cache() == "/elsewhere"
    monkeypatch.setenv(compile_cache.SWITCH, "1")
    monkeypatch.setattr(compile_cache, "setting", lambda name: None)
    assert compile_cache.traces() is None
