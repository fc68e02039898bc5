"""Strict settings for all tests: no implicit dtype or rank promotion, no warnings, no network."""

from __future__ import annotations

import os
import signal
import sys

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before the tests could request 8 CPU devices")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["JAXPERSONA_COMPILE_CACHE"] = "0"
# shells start background jobs with SIGINT ignored, and child processes inherit this
signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# warnings from third-party packages that this project cannot avoid
_TOLERATED = (
    # torch uses a deprecated NumPy interface when it shares an array
    "ignore:__array_wrap__ must accept context:DeprecationWarning",
    # SWIG bindings of dependencies (sentencepiece) on Python 3.11 and later
    "ignore:builtin type .* has no __module__ attribute:DeprecationWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    """Turn warnings into errors, even if the command line overrides the configuration file."""
    config.addinivalue_line("filterwarnings", "error")
    for line in _TOLERATED:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests, with a reason, on machines without a GPU."""
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted or jax.default_backend() == "gpu":
        return
    reason = f"needs a GPU; jax runs on {jax.default_backend()}"
    for item in wanted:
        item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Warn about tests of released checkpoints that were skipped, with the reasons."""
    skipped = [report for report in terminalreporter.stats.get("skipped", ())
               if "/real/" in report.nodeid and isinstance(report.longrepr, tuple)]
    if skipped:
        terminalreporter.section("released checkpoints were not tested", yellow=True)
    for report in skipped:
        terminalreporter.line(f"WARNING: {report.nodeid}: {report.longrepr[2]}", yellow=True)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random Qwen 3 checkpoint saved by transformers, with a byte-level tokenizer."""
    pytest.importorskip("torch")
    import support as s
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("checkpoint")
    s.byte_tokenizer().save_pretrained(folder)
    return s.random_checkpoint(folder, Qwen3ForCausalLM, Qwen3Config(**s.BYTE_MODEL))


@pytest.fixture(scope="module")
def compile_fast():
    """Compile without most LLVM optimizations, for tests whose programs run once or twice.

    Not for tests that compare the bits of two programs, or count operations of compiled programs.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
