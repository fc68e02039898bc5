"""`--adapter FOLDER` of the commands: the output is that of a folder with the merged weights."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import support as s
from jaxpersona.ckpts import vectors
from safetensors.numpy import load_file, save_file

import jaxpersona as jp

pytestmark = pytest.mark.usefixtures("compile_fast")

SCALE = 8 / 4  # lora_alpha / r
TALK = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A baker."}]


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    """Return an adapter of the checkpoint, and a copy of it with the sums of the weights."""
    root = tmp_path_factory.mktemp("adapter")
    adapter, merged = root / "adapter", root / "merged"
    shutil.copytree(checkpoint, merged)
    adapter.mkdir()
    weights, factors = load_file(merged / "model.safetensors"), {}
    draw = np.random.default_rng(0)
    for name, w in weights.items():
        if name.endswith(("q_proj.weight", "up_proj.weight")):
            a, b = (draw.normal(size=shape).astype(np.float32) * size
                    for shape, size in (((4, w.shape[1]), 1.0), ((w.shape[0], 4), 0.1)))
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            factors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            weights[name] = (w + SCALE * (b.astype(np.float64) @ a)).astype(np.float32)
    assert len(factors) == 12
    save_file(weights, merged / "model.safetensors", {"format": "pt"})
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}))
    return adapter, merged


def lines(capsys, *arguments):
    capsys.readouterr()
    assert s.run_command(list(map(str, arguments))) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_generate(capsys, checkpoint, folders):
    adapter, merged = folders
    asked = ("generate", "Who are you?", "Why?", "--max-new-tokens", "12", "--json")
    found = lines(capsys, *asked, "--model", checkpoint, "--adapter", adapter)
    assert found == lines(capsys, *asked, "--model", merged) and len(found) == 2
    assert found != lines(capsys, *asked, "--model", checkpoint)


def test_project(capsys, checkpoint, folders, tmp_path):
    adapter, merged = folders
    (tmp_path / "talk.json").write_text(json.dumps(TALK))
    vector = jp.Vector(np.random.default_rng(1).normal(size=(3, 32)), name="v")
    vectors.save_vector(tmp_path / "v.safetensors", vector)
    asked = ("project", tmp_path / "talk.json", "--on", tmp_path / "v.safetensors", "--json")
    found, wanted, plain = (lines(capsys, *asked, "--model", *model)[0][0]["v"] for model in (
        (checkpoint, "--adapter", adapter), (merged,), (checkpoint,)))
    assert abs(found - wanted) < 1e-5 and abs(found - plain) > 1e-2
