"""Export to and import from the output folder of the published Assistant Axis code."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import support as s
from published_folder import D, L, near, role_of, steps_4_and_5, torch, write

import jaxpersona as jp
from jaxpersona.engine import stream
from jaxpersona.errors import UserError
from jaxpersona.organism import method
from jaxpersona.persona.exporting import export_reference
from jaxpersona.persona.extract import extract_axis
from jaxpersona.persona.importing import import_reference
from jaxpersona.persona.reference import reference
from jaxpersona.persona.rejudge import judge_run
from jaxpersona.report.sources import places
from jaxpersona.runs.published import check_role
from jaxpersona.runs.rollouts import Settings, rollout_key
from jaxpersona.runs.run import Run
from jaxpersona.runs.status import read_status

MODEL = jp.load("mini")
ROLES = [role for role in method.roles() if role.name == "default"] + [
    role for role in method.roles() if role.name != "default"][:3]
NAMES = [role.name for role in ROLES[1:]]
QUESTIONS = method.questions()[:2]
SETTINGS = Settings(temperature=1.0, max_new_tokens=6, batch_size=8)
JUDGE = s.Scored(lambda role, key: 2 if key.startswith("pos_p1") else 3, "judge")
LEAST = 2


def extract(folder, questions=QUESTIONS, model=MODEL, **options):
    return extract_axis(model, ROLES, questions, folder, **{
        "judge": JUDGE, "settings": SETTINGS, "min_count": LEAST, **options})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a run that stores all means, its axis, and its export."""
    folder = tmp_path_factory.mktemp("made")
    found = extract(folder / "run", keep_means=None)
    export_reference(folder / "run", folder / "export")
    return folder, found


def test_the_published_steps_compute_our_axis_from_an_export(made):
    folder, found = made
    vectors, axis = steps_4_and_5(folder / "export", LEAST)
    assert near(axis, found.axis.values)
    stored = torch.load(folder / "export" / "axis.pt", weights_only=True)
    assert set(stored) == {"axis", "default_mean", "role_mean", "n_default", "n_roles"}
    assert np.array_equal(stored["axis"], found.axis.values)
    assert (stored["n_default"], stored["n_roles"]) == (1, len(vectors) - 1)
    assert near(stored["default_mean"] - stored["role_mean"], found.axis.values)
    for name, vector in vectors.items():
        value = torch.load(folder / "export" / "vectors" / f"{name}.pt", weights_only=True)
        assert value["role"] == name and near(value["vector"], vector)
        assert value["type"] == ("mean" if name == "default" else "pos_3")
    assert jp.load_axis(folder / "export" / "axis.pt").values.shape == found.axis.values.shape


def test_an_exported_line_has_the_published_fields_in_their_order(made):
    folder, _ = made
    run = Run.read(folder / "run")
    for name in ("default", *NAMES):
        lines = (folder / "export" / "responses" / f"{name}.jsonl").read_text().splitlines()
        for line, record in zip(map(json.loads, lines), run.rollouts(name), strict=True):
            assert list(line) == ["system_prompt", "prompt_index", "question_index", "question",
                                  "conversation", "label"]
            assert line["label"] == "pos"
            assert all(line[field] == record[field] for field in line if field != "label")
        keys = [f"pos_p{r['prompt_index']}_q{r['question_index']}" for r in run.rollouts(name)]
        held = torch.load(folder / "export" / "activations" / f"{name}.pt", weights_only=True)
        assert set(held) == set(keys) and {x.dtype for x in held.values()} == {torch.float32}
    scores = json.loads((folder / "export" / "scores" / f"{NAMES[0]}.json").read_text())
    assert scores == run.scores(NAMES[0]) and not (folder / "export/scores/default.json").exists()


def test_the_system_prompt_can_be_folded_into_the_user_message(made, tmp_path):
    export_reference(made[0] / "run", tmp_path / "out", fold_system=True)
    for line in (tmp_path / "out" / "responses" / f"{NAMES[0]}.jsonl").read_text().splitlines():
        value = json.loads(line)
        assert [m["role"] for m in value["conversation"]] == ["user", "assistant"]
        assert value["conversation"][0]["content"] == (
            f"{value['system_prompt']}\n\n{value['question']}")


def test_a_run_without_all_means_is_never_exported_in_part(made, tmp_path):
    extract(tmp_path / "run", keep_means=2)
    with pytest.raises(UserError, match=r"does not store the response means of \d+ of the"):
        export_reference(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    for choice, folder in (("none", None), ("sample", "activations_sample")):
        found = export_reference(tmp_path / "run", tmp_path / choice, activations=choice)
        parts = {p.name for p in (tmp_path / choice).iterdir()} - {
            "responses", "scores", "vectors", "axis.pt", "jaxpersona.json"}
        assert parts == ({folder} if folder else set())
        axis = torch.load(tmp_path / choice / "axis.pt", weights_only=True)["axis"]
        assert np.array_equal(axis, made[1].axis.values)
        assert found.means == (0 if folder is None else 2 * len(NAMES) + sum(
            1 for r in Run.read(tmp_path / "run").rollouts("default")))


def test_export_checks_its_arguments(made, tmp_path):
    run = made[0] / "run"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for options, folder, wanted in (
            ({"judge": "other"}, "out", "'other'; it must be a judge of the run in .*: 'judge'"),
            ({"activations": "some"}, "out", "must be one of all, sample, none"),
            ({"min_count": 0}, "out", "min_count is 0"), ({}, "full", "is not empty"),
            ({}, "full/a", "is a file")):
        with pytest.raises(UserError, match=wanted):
            export_reference(run, tmp_path / folder, **options)
    # a role with exactly min_count rollouts of score 3 has a vector
    most = sum(score == 3 for score in Run.read(run).scores(NAMES[0]).values())
    assert NAMES[0] in export_reference(run, tmp_path / "exact", min_count=most).roles
    assert (tmp_path / "exact" / "vectors" / f"{NAMES[0]}.pt").exists()
    assert NAMES[0] not in export_reference(run, tmp_path / "more", min_count=most + 1).roles
    found = export_reference(run, tmp_path / "out", min_count=10**6)
    assert not found.roles and not (tmp_path / "out" / "axis.pt").exists()
    assert "axis.pt was not written" in " ".join(found.notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_an_imported_axis_is_that_of_the_published_steps(tmp_path, dtype):
    source = write(tmp_path / "in", dtype=dtype)
    vectors, axis = steps_4_and_5(source, LEAST)
    torch.save({"axis": torch.tensor(axis)}, source / "axis.pt")
    found = import_reference(source, tmp_path / "run", min_count=LEAST, keep_means=5)
    assert near(found.extraction.axis.values, axis)
    assert near(jp.load_axis(tmp_path / "run" / "axis.safetensors").values, axis)
    assert set(found.rollouts.values()) == {8} and found.means == found.rollouts
    run = Run.read(tmp_path / "run")
    for name in vectors:
        label = "mean" if name == "default" else "pos_3"
        assert near(run.vectors(name)[label], vectors[name])
        assert len(run.sample(name)) == (8 if name == "default" else 5)
        held = torch.load(source / "activations" / f"{name}.pt", weights_only=True)
        for key, mean in zip(run.sample(name).keys, run.sample(name).means, strict=True):
            np.testing.assert_allclose(
                mean, held[key.replace("default", "pos")].float(), atol=0.03)
        lines = [json.loads(line) for line in (
            source / "responses" / f"{name}.jsonl").read_text().split("\n") if line]
        by_key = {(r["prompt_index"], r["question_index"]): r for r in run.rollouts(name)}
        for line in lines:
            record = by_key[line["prompt_index"], line["question_index"]]
            assert record == line | {"label": "default" if name == "default" else "pos",
                                     "sample": 0}
    scores = json.loads((source / "scores" / "a.json").read_text())
    assert run.scores("a", "imported") == scores
    assert any("relative distance of the axis from that in axis.pt: " in x for x in found.notes)


def test_scores_of_the_default_persona_are_not_imported(tmp_path):
    """A file with its scores changes nothing: its mean is taken over all rollouts."""
    source = write(tmp_path / "in")
    plain = import_reference(source, tmp_path / "plain", min_count=LEAST)
    line = (source / "responses" / "default.jsonl").read_text().split("\n")[0]
    record = json.loads(line)
    key = f"default_p{record['prompt_index']}_q{record['question_index']}"
    (source / "scores" / "default.json").write_text(json.dumps({key: 1}))
    found = import_reference(source, tmp_path / "run", min_count=LEAST)
    assert found.scores == plain.scores
    assert list(Run.read(tmp_path / "run").vectors("default")) == ["mean"]
    np.testing.assert_array_equal(found.extraction.axis.values, plain.extraction.axis.values)


def test_another_min_count_or_held_out_role_changes_the_imported_axis(tmp_path):
    source = write(tmp_path / "in")
    with_all = import_reference(source, tmp_path / "run", min_count=LEAST)
    without = import_reference(source, tmp_path / "two", min_count=LEAST, held_out=["c"])
    assert without.extraction.analysis.names == ["a", "b"]
    for part in ("activations", "scores", "responses"):
        next((source / part).glob("c.*")).unlink()
    assert near(without.extraction.axis.values, steps_4_and_5(source, LEAST)[1])
    assert not near(with_all.extraction.axis.values, steps_4_and_5(source, LEAST)[1])
    few = import_reference(source, tmp_path / "few")
    assert few.extraction is None and "at least 50 rollouts with score 3" in " ".join(few.notes)


def test_what_a_folder_lacks_is_said_and_is_not_in_the_sums(tmp_path):
    source = write(tmp_path / "in", without=("c",), unscored=("pos_p0_q1", "pos_p0_q2"),
                   lost=("pos_p1_q1",))
    found = import_reference(source, tmp_path / "run", min_count=1)
    assert near(found.extraction.axis.values, steps_4_and_5(source, 1)[1])
    said = " ".join(found.notes)
    for part in ("1 role (c): no response means", "1 role (a): rollouts without a response mean",
                 "1 role (a): rollouts without a score"):
        assert part in said
    assert (found.scores["a"], found.means["a"], found.means["c"]) == (6, 7, 0)
    status = read_status(tmp_path / "run")
    assert (status["state"], status["rollouts"], status["verdicts"], status["verdicts_total"]) == (
        "stopped", 32, 22, 24)
    judged = []
    again = s.Scored(lambda role, key: judged.append((role, key)) or 0, "imported")
    counts, _ = judge_run(tmp_path / "run", [role_of(name) for name in "abc"], again)
    assert sorted(judged) == [("a", "pos_p0_q1"), ("a", "pos_p0_q2")]
    assert counts["b"]["3"] == 5
    with pytest.raises(UserError, match="role 'a' is not complete"):  # no sum has the new scores
        export_reference(tmp_path / "run", tmp_path / "out", activations="none")


def test_an_imported_run_works_without_its_model(tmp_path, capsys):
    source, out = write(tmp_path / "in"), tmp_path / "run"
    assert s.run_command(["runs", "import", str(source), str(out), "--min-count", "2"]) == 0
    said = capsys.readouterr().out
    assert "4 roles, 32 rollouts, 24 scores, 32 response means, axis of 3 roles" in said
    assert "the model is unknown" in said
    assert s.run_command(["status", str(out)]) == 0
    assert capsys.readouterr().out.startswith("complete: 32 of 32 rollouts, 24 of 24 verdicts")
    counts, _ = judge_run(out, [role_of(name) for name in "abc"], s.Scored(name="two"))
    assert counts["a"]["3"] == 8
    assert set(places(str(out), 1).names) == {"a", "b", "c"} and (out / "roles.png").exists()
    axis = jp.load_axis(out / "axis.safetensors")
    assert set(reference(axis, 1, out / "axis.safetensors").roles) == {"a", "b", "c"}
    assert s.run_command(["runs", "export", str(out), str(tmp_path / "back"), "--reference",
                          "--activations", "sample"]) == 0
    assert near(torch.load(tmp_path / "back" / "axis.pt", weights_only=True)["axis"], axis.values)
    for name in ("default", "a"):  # the same lines, in the order of a run folder
        one, two = (sorted((f / "responses" / f"{name}.jsonl").read_text().split("\n"))
                    for f in (source, tmp_path / "back"))
        assert [json.loads(x or "{}") for x in one] == [json.loads(x or "{}") for x in two]
    assert s.run_command(["runs", "export", str(out), str(tmp_path / "no")]) == 2
    assert "--reference is missing" in capsys.readouterr().err


def test_a_run_of_an_unknown_or_another_model_is_not_continued(made, tmp_path):
    source = shutil.copytree(made[0] / "export", tmp_path / "in")
    import_reference(source, tmp_path / "run", min_count=LEAST, settings=SETTINGS)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="without a model, so the rollouts of two models") as e:
        extract(tmp_path / "run")
    assert "\n" not in str(e.value)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    other = dataclasses.replace(MODEL, name="other", params=jax.tree.map(
        lambda x: x[..., ::-1], MODEL.params))  # the same shapes, other weights
    with pytest.raises(UserError, match="the responses are from the model 'mini'"):
        import_reference(source, tmp_path / "two", model=other)
    (source / "jaxpersona.json").unlink()
    with pytest.raises(UserError, match="do not match other .median relative distance"):
        import_reference(source, tmp_path / "two", model=other)
    import_reference(source, tmp_path / "two", model=MODEL, settings=SETTINGS, min_count=LEAST)
    with pytest.raises(UserError, match="was imported from .* but the given model has the finger"):
        extract(tmp_path / "two", model=other)


def test_a_bound_run_is_continued_without_generating(made, tmp_path, monkeypatch):
    folder, first = made
    found = import_reference(folder / "export", tmp_path / "run", model=MODEL, roles=ROLES,
                             judge="judge", settings=SETTINGS, min_count=LEAST)
    assert any("median relative distance" in note for note in found.notes)
    asked, task = [], stream.Stream._task
    monkeypatch.setattr(stream.Stream, "_task", lambda self, tag, *rest: asked.append(
        tag) or task(self, tag, *rest))
    notices, judged = [], []
    judge = s.Scored(lambda role, key: judged.append(key) or JUDGE._score(role, key), "judge")
    again = extract(tmp_path / "run", notice=notices.append, judge=judge)
    assert not asked and not judged and near(again.axis.values, first.axis.values)
    assert "imported from" in notices[0]
    assert Run.read(tmp_path / "run").manifest["imported"]["rollouts"] == first.rollouts
    more = extract(tmp_path / "run", method.questions()[:3])
    assert len(asked) == sum(len(role.prompts) for role in ROLES)
    assert more.rollouts == first.rollouts + len(asked)
    with pytest.raises(UserError, match="arguments.temperature was 1.0, now 0.5"):
        extract(tmp_path / "run", settings=Settings(temperature=0.5))


def test_means_that_a_folder_lacks_are_computed_with_the_model(made, tmp_path):
    folder, first = made
    source = shutil.copytree(folder / "export", tmp_path / "in")
    (source / "activations" / f"{NAMES[0]}.pt").unlink()
    import_reference(source, tmp_path / "run", model=MODEL, roles=ROLES, judge="judge",
                     settings=SETTINGS, min_count=LEAST)
    again = extract(tmp_path / "run")
    assert set(again.analysis.names) == set(first.analysis.names)
    assert s.relative(again.axis.values, first.axis.values) < 1e-4
    assert len(Run.read(tmp_path / "run").sample(NAMES[0])) == len(
        Run.read(folder / "run").rollouts(NAMES[0]))


def test_texts_alone_need_the_model_or_an_axis_and_keep_their_keys(tmp_path):
    source = write(tmp_path / "in", without=("default", "a", "b", "c"))
    with pytest.raises(UserError, match="contains neither activations nor an axis, so the "
                                        "number of layers"):
        import_reference(source, tmp_path / "run")
    torch.save(torch.ones(L, D), source / "axis.pt")
    found = import_reference(source, tmp_path / "run")
    assert found.extraction is None and set(found.means.values()) == {0}
    run = Run.read(tmp_path / "run")
    assert [rollout_key(r) for r in run.rollouts("default")][:2] == [
        "default_p0_q0", "default_p1_q0"]
    counts, _ = judge_run(tmp_path / "run", [role_of(name) for name in "abc"], s.Scored())
    assert counts["a"]["3"] == 8


def test_an_empty_reply_has_no_mean_and_is_not_missing(tmp_path):
    source = write(tmp_path / "in", lost=("pos_p0_q1",))
    path = source / "responses" / "a.jsonl"
    rows = path.read_text().split("\n")
    row = json.loads(rows[1])
    row["conversation"][-1]["content"] = ""
    rows[1] = json.dumps(row)
    path.write_text("\n".join(rows))
    found = import_reference(source, tmp_path / "run", min_count=LEAST)
    assert not any("without a response mean" in note for note in found.notes)
    assert near(found.extraction.axis.values, steps_4_and_5(source, LEAST)[1])
    assert Run.read(tmp_path / "run").sums("a").groups["pos_p0_q1"] == "empty"
    assert read_status(tmp_path / "run")["state"] == "complete"
    export_reference(tmp_path / "run", tmp_path / "out")
    held = torch.load(tmp_path / "out" / "activations" / "a.pt", weights_only=True)
    assert len(held) == 7 and "pos_p0_q1" not in held
    assert near(steps_4_and_5(tmp_path / "out", LEAST)[1], found.extraction.axis.values)


def test_failed_verdicts_held_out_roles_and_samples_are_exported_as_they_are(tmp_path):
    failing = s.Scored(lambda role, key: RuntimeError("busy") if (
        role, key) == (NAMES[0], first) else 3, "judge")
    first = f"pos_p0_q{QUESTIONS[0].id}"
    with pytest.warns(UserWarning, match="replies on which the judge failed: 1 "):
        found = extract(tmp_path / "run", judge=failing, keep_means=None, held_out=[NAMES[2]],
                        min_count=1)
    said = export_reference(tmp_path / "run", tmp_path / "out")
    assert any(f"({NAMES[2]}): held out" in note for note in said.notes)
    scores = json.loads((tmp_path / "out" / "scores" / f"{NAMES[0]}.json").read_text())
    held = torch.load(tmp_path / "out" / "activations" / f"{NAMES[0]}.pt", weights_only=True)
    assert first not in scores and set(held) == {first, *scores}
    # the mean of a reply without a verdict is stored exactly, not as a difference
    live = Run.read(tmp_path / "run").live(NAMES[0], found.axis.values.shape, repair=False)
    assert np.array_equal(held[first], live.mean(first))
    assert not (tmp_path / "out" / "vectors" / f"{NAMES[2]}.pt").exists()
    for part in ("activations/{}.pt", "scores/{}.json", "responses/{}.jsonl"):
        (tmp_path / "out" / part.format(NAMES[2])).unlink()
    assert near(steps_4_and_5(tmp_path / "out", 1)[1], found.axis.values)


def test_an_incomplete_run_and_several_samples_are_refused(made, tmp_path):
    run = shutil.copytree(made[0] / "run", tmp_path / "run")
    (run / "rollouts" / f"{NAMES[1]}.jsonl").unlink()
    with pytest.raises(UserError, match=f"role '{NAMES[1]}' is not complete"):
        export_reference(run, tmp_path / "out")
    found = export_reference(run, tmp_path / "out", incomplete=True)
    assert not found.roles and any(f"({NAMES[1]}): incomplete" in x for x in found.notes)
    assert not (tmp_path / "out" / "responses" / f"{NAMES[1]}.jsonl").exists()
    extract(tmp_path / "two", QUESTIONS[:1], settings=dataclasses.replace(SETTINGS, samples=2))
    with pytest.raises(UserError, match="has several samples per prompt and question"):
        export_reference(tmp_path / "two", tmp_path / "no")


def test_verdicts_of_another_judge_do_not_make_a_role_incomplete(made, tmp_path):
    run, given = shutil.copytree(made[0] / "run", tmp_path / "run"), []

    def stops(role, key):
        given.append(role)
        if len(given) == 2:
            raise UserError("the budget is used")
        return 3

    with pytest.raises(UserError, match="the budget is used"):
        extract(run, judge=s.Scored(stops, "other"), keep_means=None)
    with pytest.raises(UserError, match=f"role {given[0]!r} is not complete"):
        export_reference(run, tmp_path / "no", judge="other")
    found = export_reference(run, tmp_path / "out", judge="judge")
    assert found.roles == sorted(NAMES)
    for part in ("scores", "vectors", "activations"):
        assert sorted(path.name for path in (tmp_path / "out" / part).iterdir()) == sorted(
            path.name for path in (made[0] / "export" / part).iterdir())


def test_a_default_persona_needs_no_min_count_in_an_export(tmp_path):
    roles = [dataclasses.replace(ROLES[0], prompts=ROLES[0].prompts[:1]), *ROLES[1:]]
    found = extract_axis(MODEL, roles, QUESTIONS, tmp_path / "run", judge=JUDGE, min_count=8,
                         settings=SETTINGS, keep_means=None)
    assert found.counts[NAMES[0]]["3"] == 8
    assert export_reference(tmp_path / "run", tmp_path / "out").roles == sorted(NAMES)
    assert near(steps_4_and_5(tmp_path / "out", 8)[1], found.axis.values)


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "C:x", ".x", "a\nb", "x" * 201, ""])
def test_a_role_name_that_is_no_plain_file_name_is_refused(name):
    with pytest.raises(UserError, match="cannot be used as a file name in the published format"):
        check_role(name)
