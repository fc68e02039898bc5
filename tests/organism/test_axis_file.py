"""The axis of the embedded model, which is part of the package."""

from __future__ import annotations

import json

import numpy as np

import jaxpersona as jp
from jaxpersona.organism import method
from jaxpersona.persona.axis import PERCENTILES


def test_it_belongs_to_the_model_and_passes_the_check():
    model, axis = jp.load("mini"), jp.load_axis("mini")
    assert axis.fingerprint == model.fingerprint and axis.values.shape == (8, 128)
    assert {of: set(table) for of, table in axis.percentiles.items()} == dict.fromkeys(
        ("default", "all"), {f"p{q}" for q in PERCENTILES})
    assert axis.notes["judge"] == "rules" and axis.notes["default_rollouts"] == 200
    found = jp.check(model, axis, floor=axis.thresholds("p25"))
    assert found.ok, found.faults


def test_it_ranks_roles_by_their_known_likeness():
    """Replies of distant roles have lower projections in new rollouts."""
    model, axis = jp.load("mini"), jp.load_axis("mini")
    roles = {role.name: role for role in method.roles()}
    question = method.questions(1)[0].text
    talks = [[{"role": "system", "content": prompt}] * bool(prompt)
             + [{"role": "user", "content": question}]
             for name in ("default", "void") for prompt in roles[name].prompts]
    out = jp.generate(model, talks, capture=jp.capture.mean(jp.response), max_new_tokens=32)
    values = np.einsum("nld,ld->nl", out.captured["mean"], axis.unit)
    half = len(roles["default"].prompts)
    assert (values[:half].min(0) > values[half:].max(0))[2:].all()


def test_a_file_of_that_name_does_not_hide_it(tmp_path, monkeypatch):
    (tmp_path / "mini").write_text(json.dumps({}))
    monkeypatch.chdir(tmp_path)
    assert jp.load_axis("mini").name == "assistant"
