"""What an import, a judge and an export say about a folder, and the means that are compared."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import support as s
from published_folder import role_of, torch, write

from jaxpersona.errors import UserError
from jaxpersona.judges.judges import NoJudge
from jaxpersona.judges.protocol import Verdict
from jaxpersona.persona import source as module
from jaxpersona.persona.exporting import export_reference
from jaxpersona.persona.importing import import_reference
from jaxpersona.persona.rejudge import judge_run


class Paid(s.Scored):
    """A judge whose verdicts cost 0.5 USD."""

    def score(self, items):
        for item in items:
            yield Verdict(item.key, 2, cost=0.5)


def renumber(folder):
    """Give the second prompt of role c the index 3."""
    for path in (folder / "responses" / "c.jsonl", folder / "scores" / "c.json"):
        path.write_text(path.read_text().replace("pos_p1_", "pos_p3_").replace(
            '"prompt_index": 1', '"prompt_index": 3'))
    path = folder / "activations" / "c.pt"
    torch.save({key.replace("p1", "p3"): mean for key, mean in torch.load(
        path, weights_only=True).items()}, path)


def test_what_is_not_imported_is_said_and_a_run_is_judged_and_exported(tmp_path):
    source, out, told = write(tmp_path / "in"), tmp_path / "run", []
    renumber(source)
    (source / "scores" / "default.json").write_text("{}")
    path = source / "responses" / "a.jsonl"
    path.write_text(path.read_text().replace("{", '{"mood": 1, ', 1))
    found = import_reference(source, out, min_count=2, held_out=["b"],
                             report=lambda *step: told.append(step))
    assert told == [(step, i + 1, 4, 0) for step in ("checking", "import") for i in range(4)]
    for note in ("fields that were not imported: mood (1 rollout)",
                 "1 role (c): missing prompt indices, so `jaxpersona axis` cannot continue the "
                 "run; import it with the roles (--roles)",
                 "1 role (default): not judged by this package; its scores were not imported"):
        assert note in found.notes
    assert found.extraction.analysis.names == ["a", "c"]

    roles, told = [role_of(name) for name in "abc"], []
    counts, cost = judge_run(out, roles, Paid(name="two"), report=lambda *step: told.append(step))
    assert told == [("judging", i + 1, 24, 0) for i in range(24)] and cost == 12.0
    assert counts == {name: {"0": 0, "1": 0, "2": 8, "3": 0, "None": 0} for name in "abc"}
    assert judge_run(out, roles, Paid(name="two")) == (counts, 0.0)  # nothing is judged again
    with pytest.raises(UserError, match="the run's roles b, c are missing from roles"):
        judge_run(out, roles[:1], NoJudge())

    told = []
    said = export_reference(out, tmp_path / "one", report=lambda *step: told.append(step))
    assert told == [("export", i + 1, 4, 0) for i in range(4)]
    assert (said.rollouts, said.scores, said.means, said.roles) == (32, 24, 32, ["a", "c"])
    about = json.loads((tmp_path / "one" / "jaxpersona.json").read_text())
    assert (about["judge"], about["min_count"], about["held_out"], about["roles_in_axis"]) == (
        "imported", 2, ["b"], ["a", "c"])
    assert about["activations"] == "all" and about["imported"]["rollouts"] == 32
    assert "4_vectors.py needs --min_count 2 to use the same roles" in said.notes
    most = export_reference(out, tmp_path / "few", min_count=6, activations="sample").notes
    assert "3 roles (a, b, c): fewer than 6 rollouts of score 3, therefore no vector" in most
    assert any(note.startswith("activations_sample contains only") for note in most)
    judge_run(out, roles, NoJudge())
    other = export_reference(out, tmp_path / "none", judge="none", activations="none")
    assert other.roles == [] and other.scores == 24 and other.means == 0
    assert any(note.startswith("3 roles (a, b, c): no sums by the scores of the judge 'none'")
               for note in other.notes)
    assert any(note.startswith("the judge 'none' gave score 3") for note in other.notes)
    assert set(json.loads((tmp_path / "none/scores/a.json").read_text()).values()) == {3}


def compared(monkeypatch, replies, factors):
    """Compare means of ones with recomputed ones, `factors[key]` times as large, and a report."""
    source, asked, told = object.__new__(module.Source), [], []
    source.folder, source._report = "folder", lambda *step: told.append(step)

    def reread(model, records):
        asked.extend(record["key"] for record in records)
        return [np.full((3, 4), factors[record["key"]]) for record in records]

    monkeypatch.setattr(module, "reread", reread)
    texts = SimpleNamespace(records={key: {"key": key, "conversation": [
        {"role": "user", "content": "Who?"}, {"role": "assistant", "content": text}]}
        for key, text in replies.items()})
    found = source._distance(SimpleNamespace(name="mini"), texts,
                             {key: np.ones((3, 4)) for key in replies})
    return found, asked, told


def test_four_means_of_replies_that_can_be_encoded_are_compared(monkeypatch):
    replies = {"a": "", "b": "x", "c": "cut \ufffd", "d": "y", "e": "z", "f": "u", "g": "v"}
    factors = {"b": 1.0, "d": 1.25, "e": 1.25, "f": 9.0}
    found, asked, told = compared(monkeypatch, replies, factors)
    assert asked == ["b", "d", "e", "f"] and found == pytest.approx(0.25)
    assert told == [("comparing", 0, 4, 0), ("comparing", 4, 4, 0)]
    assert compared(monkeypatch, {"a": "", "c": "\ufffd"}, {})[0] is None
    assert compared(monkeypatch, {"b": "x"}, {"b": 1.5})[0] == 0.5
    for factor in (1.51, float("nan")):
        with pytest.raises(UserError, match="are not those of mini .*over 1 rollouts"):
            compared(monkeypatch, {"b": "x"}, {"b": factor})
