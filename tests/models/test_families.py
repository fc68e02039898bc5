"""Every family: edits compared with PyTorch hooks, and the whole method on a random checkpoint.

More cases for Qwen 3 are in test_interventions.py.
"""

from __future__ import annotations

import json

import hf
import numpy as np
import pytest
import support as s
from jaxpersona.ckpts.vectors import load_axis

from jaxpersona.data.texts import Question, Role
from jaxpersona.engine.generate import generate
from jaxpersona.interventions import cap, chain, steer
from jaxpersona.interventions.where import everywhere, generated

pytestmark = pytest.mark.usefixtures("compile_fast")

NEW = 24
LENGTHS = (31, 5, 18, 2)
U, V = np.random.default_rng(4).normal(size=(2, 48))
FIELDS = {  # windows shorter than the longest row, and some layers with full attention
    "llama": {"attention_bias": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    "mistral": {"sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "gemma2": {"sliding_window": 9, "query_pre_attn_scalar": 24},
    "gemma3": {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2,
               "num_hidden_layers": 4},
}


@pytest.mark.parametrize("family", [
    pytest.param(family, marks=pytest.mark.slow) if family in ("llama", "mistral") else family
    for family in FIELDS])
def test_steer_and_cap_equal_hooks(family, tmp_path):
    made = hf.model(family, seed=2, **FIELDS[family])
    made.generation_config.eos_token_id = None
    params, config = hf.params(made, tmp_path)
    model = s.Tiny(config, params, stop_ids=(), fingerprint="0" * 16)
    rows = hf.prompts(list(LENGTHS), 199)
    hooks = {0: [hf.steered(U, -0.4)], 1: [hf.capped(V, 2.0)], 2: [hf.capped(V, 2.0)]}
    for where in (everywhere, generated):
        tokens, stream = hf.generate(made, rows, hooks, NEW, decode_only=where is generated)
        edits = chain(steer(U, layers=0, scale=-0.4, where=where),
                      cap(V, layers=slice(1, 3), floor=2.0, where=where))
        ours = generate(model, rows, interventions=edits, capture=s.READ, max_new_tokens=NEW,
                        batch_size=len(rows))
        worst = hf.same_run(ours, rows, tokens, stream)
        assert all((counts.changed > 0).any() for counts in ours.applied)
        print(f"{family}, {where}: {worst:.1e}")
    plain, _ = hf.generate(made, rows, {}, NEW)
    assert (plain != tokens).any(), "the edits do not change the replies"


ROLES = [Role("default", ("", "You are an AI assistant."), ""),
         Role("ghost", ("You are a ghost.",), ""), Role("tutor", ("You are a tutor.",), "")]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return s.write_texts(tmp_path_factory.mktemp("texts"), ROLES, [Question(0, "What is it?")])


@pytest.mark.parametrize(("family", "template"), [
    ("gemma3", True), ("llama", False),
    *(pytest.param(family, True, marks=pytest.mark.slow)
      for family in hf.FAMILIES if family != "gemma3")])
def test_the_method_runs_on_a_random_checkpoint(family, template, texts, tmp_path, capsys):
    """Run `jaxpersona axis --model FOLDER`; without a chat template, the model is a base model."""
    folder = tmp_path / "model"
    s.byte_tokenizer(template=template).save_pretrained(folder)
    config = hf.config(family, **s.BYTE_MODEL)
    s.random_checkpoint(folder, hf.architecture(family), config)
    assert s.run_command(s.axis_command(folder, texts, tmp_path / "run")) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["roles"] == 2 and summary["rollouts"] == 4 and summary["layers"] == 3
    axis = load_axis(tmp_path / "run" / "axis.safetensors")
    assert axis.values.shape == (3, 32) and np.isfinite(axis.values).all()
    assert np.linalg.norm(axis.values, axis=1).min() > 0
    lines = (tmp_path / "run/rollouts/ghost.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    assert "You are a ghost." in json.dumps(record)
