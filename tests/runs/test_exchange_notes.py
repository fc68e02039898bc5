"""What an import, a judge and an export say about a folder, and the means that are compared."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import support as s
from published_folder import role_of, torch, write

from jaxpersona.data.reading import Faults
from jaxpersona.errors import UserError
from jaxpersona.judges.judges import NoJudge
from jaxpersona.judges.protocol import Verdict
from jaxpersona.persona import source as module
from jaxpersona.persona.exporting import export_reference
from jaxpersona.persona.importing import import_reference
from jaxpersona.persona.rejudge import judge_run
from jaxpersona.runs import published

LINE = {"system_prompt": "s", "prompt_index": 999_999, "question_index": 0, "question": "u",
        "conversation": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}


@pytest.mark.parametrize(("role", "change", "wanted"), [
    ("ghost", {"label": "pos"}, "pos"), ("ghost", {"label": "default"}, "must be pos"),
    ("default", {"label": "pos"}, "default"), ("default", {"label": "default"}, "default"),
    ("default", {"label": "neg"}, "must be pos or default"), ("ghost", {}, "label is missing"),
    ("ghost", {"label": "pos", "prompt_index": 1_000_000}, "integer from 0 to 999,999"),
    ("ghost", {"label": "pos", "question_index": 1.0}, "question_index is 1.0"),
    ("ghost", {"label": "pos", "mood": 1, "sample": 4}, "pos"),
    ("ghost", {"label": "pos", "conversation": LINE["conversation"][:1]}, "roles user; it must")])
def test_a_published_line_becomes_a_rollout_with_the_label_of_its_role(role, change, wanted):
    faults = Faults()
    found = published._record({**LINE, **change}, role, "line 1", faults)
    if faults:
        assert found is None and len(faults) == 1 and wanted in faults[0]
    else:
        assert found == {**LINE, "label": wanted, "sample": 0}


def test_only_files_of_roles_are_read_and_only_five_keys_are_named(tmp_path):
    (tmp_path / "scores").mkdir()
    for name in ("b.json", "a.json", ".a.json.swp", ".c.json", "a.jsonl", "readme.txt"):
        (tmp_path / "scores" / name).touch()
    assert published.roles_in(tmp_path, "scores") == ["a", "b"]
    assert published.roles_in(tmp_path, "responses") == []
    assert published._some(list("abcde")) == "a, b, c, d, e"
    assert published._some(list("abcdef")) == "a, b, c, d, e, … (6 in total)"
    published.check_role("x" * 200)  # the longest name
    texts = published.Texts({"one": {"prompt_index": 3, "system_prompt": "z", "question_index": 9,
                                     "question": "w"},
                             "two": {"prompt_index": 1, "system_prompt": "y", "question_index": 9,
                                     "question": "w"}})
    assert list(texts.prompts().items()) == [(1, "y"), (3, "z")] and texts.questions() == {9: "w"}


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
    one = import_reference(source, tmp_path / "held", min_count=2, held_out=["b", "c"])
    assert one.extraction is None and any(
        "score 3 that have a response mean: 1; the axis needs" in note for note in one.notes)
    least = import_reference(source, tmp_path / "least", min_count=5)  # each role has five
    assert least.extraction.analysis.names == ["a", "b", "c"]

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
    assert "3 roles (a, b, c): fewer than 6 rollouts with score 3, therefore no vector" in most
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
        with pytest.raises(UserError, match="do not match mini .*over 1 rollouts"):
            compared(monkeypatch, {"b": "x"}, {"b": factor})


def test_rollouts_of_the_default_persona_may_have_its_label(tmp_path):
    """The keys of its response means then begin with this label."""
    plain, named = write(tmp_path / "plain"), write(tmp_path / "named")
    path = named / "responses" / "default.jsonl"
    path.write_text(path.read_text().replace('"label": "pos"', '"label": "default"'))
    with pytest.raises(UserError, match=r"default\.pt: keys without a rollout .*pos_p0_q0"):
        import_reference(named, tmp_path / "run", min_count=2)
    path = named / "activations" / "default.pt"
    means = torch.load(path, weights_only=True)
    torch.save({key.replace("pos", "default"): mean for key, mean in means.items()}, path)
    one, two = (import_reference(folder, tmp_path / f"run-{folder.name}", min_count=2)
                for folder in (plain, named))
    assert one.means == two.means and one.extraction and two.extraction
    assert np.array_equal(one.extraction.axis.values, two.extraction.axis.values)
