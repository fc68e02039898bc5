"""Damage to GGUF models, chat templates, saved dialogues and checkpoints (see `fuzz.check`)."""

from __future__ import annotations

import io
import json
import shutil

import fuzz
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import support as s
from jaxpersona.ckpts.vectors import save_vector

import jaxpersona as jp
from jaxpersona.models.batch import batch
from jaxpersona.persona.monitor import EditCount, Monitor
from jaxpersona.persona.session import Session, Turn
from jaxpersona.persona.transcript import record
from jaxpersona.text import chat
from jaxpersona.training import learn
from jaxpersona.vectors.vector import Axis, Vector

LAYERS, WIDTH = 3, 32  # of the model from the fixture `checkpoint`
VALUES = np.random.default_rng(0).normal(size=(LAYERS, WIDTH)).astype(np.float32)
TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."}, {"role": "user", "content": "How?"}]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """Return a folder with a GGUF model of each type of vocabulary, and a vector of its shape."""
    pytest.importorskip("gguf")
    pytest.importorskip("torch")
    import gguf_files
    import hf
    from tokenizers import pre_tokenizers

    folder = tmp_path_factory.mktemp("gguf")
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_start|>", "<|im_end|>"]
    size = {"vocab_size": 258, "num_hidden_layers": 1}
    model = hf.model("qwen3", seed=3, **size)
    kinds = [1] * 256 + [3, 3]
    gguf_files.write(folder / "bytes.gguf", model, tokens=letters, kinds=kinds,
                     merges=["t h", "i n"], template=s.byte_tokenizer().chat_template,
                     fields={"tokenizer.ggml.eos_token_id": 257})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(250)), "\u2581a", "\u2581",
              "a", "b", "ab"]
    gguf_files.write(folder / "pieces.gguf", hf.model("llama", seed=3, **size), tokens=pieces,
                     kinds=[2, 3, 3, *[6] * 250, 1, 1, 1, 1, 1], fields={
                         "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": None,
                         "tokenizer.ggml.scores": [-float(i) for i in range(258)],
                         "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
                         "tokenizer.ggml.unknown_token_id": 0})
    save_vector(folder / "v.safetensors", Vector(np.ones((1, model.config.hidden_size),
                                                         np.float32)))
    return folder


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("count", fuzz.COUNTS)
@pytest.mark.parametrize("name", ["bytes", "pieces"])
def test_damage_to_a_gguf_model(gguf, name, count, capsys):
    path = gguf / f"{name}.gguf"
    fuzz.check(path, gguf, fuzz.damaged_gguf, lambda: s.run_command(
        ["vectors", "convert", str(gguf / "v.safetensors"), str(gguf / "o.safetensors"),
         "--model", str(path)]), count, capsys)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_damage_to_a_chat_template(checkpoint, tmp_path, count, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    path = folder / "chat_template.jinja"

    def read():
        chat.encode(jp.load(folder), [TALK], reply=True)

    fuzz.check(path, tmp_path, fuzz.damaged_template, lambda: fuzz.called(read), count, capsys)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("count", fuzz.COUNTS)
@pytest.mark.parametrize("name", ["saved.json", "list.json"])
def test_damage_to_a_saved_dialogue(checkpoint, tmp_path, name, count, capsys, monkeypatch):
    axis = Axis(VALUES, "assistant", "m")
    save_vector(tmp_path / "a.safetensors", axis)
    model = jp.load(checkpoint)
    session = Session(model, monitor=Monitor(model, axis, layers=1), system="Be kind.")
    session.turns = [
        Turn("Why?", "So.", "stop", 4, 20, True, {1: 0.5}, [EditCount("cap", [1], 4, [2])]),
        Turn("How?", "Thus.", "length", 5, 40)]
    (tmp_path / "saved.json").write_text(json.dumps(record(session)))
    (tmp_path / "list.json").write_text(json.dumps(TALK[:3]))
    monkeypatch.setattr("jaxpersona.cli.support.open_model", lambda *_: model)
    path, again = tmp_path / name, tmp_path / "again.json"

    def read():
        lines = f"/load {path}\n/save {again}\n/load {again}\n"
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return s.run_command(["chat", "--axis", str(tmp_path / "a.safetensors"), "--no-check"])

    fuzz.check(path, tmp_path, fuzz.damaged_json, read, count, capsys)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("count", fuzz.COUNTS)
@pytest.mark.parametrize("name", ["direction.json", "_METADATA", "_CHECKPOINT_METADATA",
                                  "manifest.ocdbt", "_sharding", "d/*"])
def test_damage_to_a_training_checkpoint(tmp_path, name, count, capsys):
    """Orbax reads all files but direction.json; damage that it does not detect does no harm."""
    folder, kept, model = tmp_path / "fit", tmp_path / "kept", s.tiny_model(n_layers=1)

    def loss(output, rows):
        return 0.0 * output.logits.sum() + jnp.ones(())

    def fit(steps):
        return learn.fit(model, learn.Direction(32, layers=0), loss, [batch([[5, 9, 8]])],
                         steps=steps, folder=folder, optimizer=optax.sgd(0.1))

    fit(1)
    path = max(folder.rglob(name), key=lambda p: p.stat().st_size)  # of "d/*", the arrays
    shutil.copytree(folder, kept)

    def restore():
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)

    make = fuzz.damaged_json if path.read_bytes()[:1] == b"{" else fuzz.damage
    fuzz.check(path, tmp_path, make, lambda: fuzz.called(lambda: fit(1)), count, capsys,
               after=restore, least=0, seed=name)
