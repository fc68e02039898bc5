"""Strictness for every test: no implicit promotion of types or ranks, no warning, no network."""

from __future__ import annotations

import os
import signal
import sys

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before the tests could ask for 8 CPU devices")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["JAXPERSONA_COMPILE_CACHE"] = "0"
# a shell that starts a job in the background lets it ignore SIGINT, and so its child processes
signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# what third parties emit and this project cannot mend
_TOLERATED = (
    # torch asks for numpy's deprecated interface when it shares an array with it
    "ignore:__array_wrap__ must accept context:DeprecationWarning",
    # swig builds of dependencies (sentencepiece) on Python 3.11 and later
    "ignore:builtin type .* has no __module__ attribute:DeprecationWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    """Turn warnings into errors, whatever the command line says of the configuration file."""
    config.addinivalue_line("filterwarnings", "error")
    for line in _TOLERATED:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, aloud, what needs an accelerator that is not there."""
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted or jax.default_backend() == "gpu":
        return
    reason = f"needs a GPU; jax runs on {jax.default_backend()}"
    for item in wanted:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random Qwen 3 saved by transformers, with a byte-level tokenizer made here."""
    pytest.importorskip("torch")
    import support as s
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("checkpoint")
    s.byte_tokenizer().save_pretrained(folder)
    return s.random_checkpoint(folder, Qwen3ForCausalLM, Qwen3Config(**s.BYTE_MODEL))
