"""Faulty output folders of the published code are refused, and no import leaves a partial run."""

from __future__ import annotations

import json
import pickle
import re
import shutil

import numpy as np
import pytest
from published_folder import D, L, role_of, torch, write

import jaxpersona as jp
from jaxpersona.data.texts import Role
from jaxpersona.errors import UserError
from jaxpersona.persona.importing import import_reference
from jaxpersona.runs.rollouts import Settings
from jaxpersona.runs.run import Run

LEAST = 2


def lines(change):
    """Return a function that changes the lines of a.jsonl."""
    def act(folder):
        path = folder / "responses" / "a.jsonl"
        rows = path.read_text().split("\n")
        change(rows)
        path.write_text("\n".join(rows))
    return act


def field(name, value, row=2):
    return lines(lambda rows: rows.__setitem__(row, json.dumps(json.loads(rows[row]) | {
        name: value})))


def score(key, value):
    def act(folder):
        path = folder / "scores" / "a.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    return act


def tensors(change, name="b"):
    def act(folder):
        path = folder / "activations" / f"{name}.pt"
        held = torch.load(path, weights_only=True)
        made = change(held)  # a new value, or None or a tensor that was changed in place
        torch.save(made if isinstance(made, (dict, list)) else held, path)
    return act


def unsafe(folder):
    class Call:
        def __reduce__(self):
            return (open, (str(folder / "ran"), "w"))
    (folder / "activations" / "b.pt").write_bytes(pickle.dumps({"pos_p0_q0": Call()}))


def rename(folder):
    (folder / "responses" / "a.jsonl").rename(folder / "responses" / "x:..\\a.jsonl")


FAULTS = {
    "two lines of broken JSON": (lines(lambda r: (r.__setitem__(1, "{"), r.__setitem__(4, "x"))),
                                 r"a.jsonl, line 2: invalid JSON.*a.jsonl, line 5: invalid JSON"),
    "a cut line": (lines(lambda r: r.__setitem__(7, r[7][:40])), "a.jsonl, line 8: invalid JSON"),
    "no object": (lines(lambda r: r.__setitem__(0, "[]")), "line 1: contains a list"),
    "no reply": (field("conversation", []), "line 3: conversation has messages of the roles none"),
    "no messages": (field("conversation", "hi"), "line 3: conversation is not a list of messages"),
    "a label": (field("label", "neg"), "line 3: label is 'neg'; it must be pos"),
    "an index": (field("prompt_index", -1), "line 3: prompt_index is -1; it must be an integer"),
    "a boolean": (field("question_index", True), "line 3: question_index is True"),
    "a prompt": (field("system_prompt", None), "line 3: system_prompt is null, not a string"),
    "a question": (field("question", "Who?"),
                   "line 7: question differs from the question of an earlier"),
    "another prompt": (field("system_prompt", "Be."),
                       "line 3: system_prompt differs from the system_prompt of"),
    "a rollout twice": (lines(lambda r: r.append(r[0])), "line 10: a rollout of prompt 0 and"),
    "no line": (lines(lambda r: r.clear()), "a.jsonl: contains no rollout"),
    "a score out of range": (score("pos_p0_q0", 4), "the score of 'pos_p0_q0' is 4; it must be an"),
    "a fractional score": (score("pos_p0_q0", 2.5), "'pos_p0_q0' is 2.5"),
    "a true score": (score("pos_p0_q0", True), "'pos_p0_q0' is True"),
    "a score of nothing": (score("pos_p9_q9", 3), "a.json: keys without a rollout in .*: pos_p9_"),
    "a tensor of nothing": (tensors(lambda t: t.update(x=t["pos_p0_q0"])),
                            r"b.pt: keys without a rollout in .*: x"),
    "NaN": (tensors(lambda t: t["pos_p0_q1"].fill_(np.nan)), r"b.pt: .* non-finite values: .*q1"),
    "infinity": (tensors(lambda t: t["pos_p0_q1"][0].fill_(np.inf)), r"non-finite values: .*q1"),
    "a shape": (tensors(lambda t: t.update(pos_p0_q1=torch.zeros(L, D + 1))),
                r"b.pt: tensors of another shape than \[3, 4\]: pos_p0_q1"),
    "one layer": (tensors(lambda t: {k: v[0] for k, v in t.items()}), "of another shape than"),
    "integers": (tensors(lambda t: {k: v.long() for k, v in t.items()}),
                 r"invalid entries \(8: .*only dense floating-point tensors"),
    "a list": (tensors(lambda t: list(t.values())), "contains a list; it must contain a dict"),
    "shared memory": (tensors(lambda t: {k: torch.zeros(1).expand(10**6, 9) for k in t}),
                      "declare 72000000 elements"),
    "a pickle that runs code": (unsafe, r"unsafe pickle \(it would call|invalid \.pt file"),
    "a damaged axis": (lambda f: (f / "axis.pt").write_bytes(b"PK\3\4"), "axis.pt: invalid"),
    "scores of no role": (lambda f: (f / "scores" / "z.json").write_text("{}"),
                          "z.json: the role is unknown"),
    "a name": (rename, "cannot be used as a file name in the published format"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_folder_is_refused_and_leaves_nothing(tmp_path, name):
    damage, wanted = FAULTS[name]
    source = write(tmp_path / "in")
    damage(source)
    with pytest.raises(UserError) as caught:
        import_reference(source, tmp_path / "run", min_count=LEAST)
    assert re.search(wanted, " ".join(str(caught.value).split())), str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"] and not (source / "ran").exists()


def test_roles_must_be_those_of_the_responses(tmp_path):
    source = write(tmp_path / "in")
    cast = [role_of(name) for name in "abc"]
    for roles, wanted in ((cast, "the role 'default' is unknown"),
                          ([*cast[1:], role_of("a1")], "the role 'a' is unknown")):
        with pytest.raises(UserError, match=wanted):
            import_reference(source, tmp_path / "run", roles=roles)
    wrong = [*cast[:2], Role("c", ("You are c0.", "Other."), ""),
             Role("default", ("", "You are default1."), "")]
    with pytest.raises(UserError, match="the system prompts with prompt_index 1 differ from the"):
        import_reference(source, tmp_path / "run", roles=wrong)
    for options, wanted in (({"held_out": ["default"]}, "held_out contains"),
                            ({"held_out": ["z"]}, r"held_out contains \['z'\]"),
                            ({"settings": Settings(samples=2)}, "samples is 2"),
                            ({"judge": ""}, "judge is ''"), ({"min_count": 0}, "min_count is 0")):
        with pytest.raises(UserError, match=wanted):
            import_reference(source, tmp_path / "run", **options)
    with pytest.raises(UserError, match="has .*8 layers|have 3 layers and the width 4"):
        import_reference(source, tmp_path / "run", model=jp.load("mini"))


def test_only_a_run_is_overwritten_and_only_after_the_source_was_read(tmp_path):
    source, out = write(tmp_path / "in"), tmp_path / "run"
    import_reference(source, out, min_count=LEAST)
    (out / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="contains a run; choose another folder, or delete"):
        import_reference(source, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    shutil.copytree(source, tmp_path / "bad")
    score("pos_p0_q0", 7)(tmp_path / "bad")
    with pytest.raises(UserError, match="is 7"):
        import_reference(tmp_path / "bad", out, overwrite=True)
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for part in ("activations", "scores", "responses"):
        next((source / part).glob("c.*")).unlink()
    import_reference(source, out, min_count=LEAST, overwrite=True)
    assert set(Run.read(out).manifest["roles"]) == {"a", "b", "default"}
    assert (out / "mine.txt").exists() and not list(out.rglob("c.*"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(UserError, match="is not empty and has no run.json"):
        import_reference(source, tmp_path / "other", overwrite=True)
