"""Run folders of format 2: their rollouts, means and scores are taken over into a new run."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import support as s
from jaxpersona.ckpts.files import read_tensors, write_tensors
from test_damages import MODEL, QUESTIONS, ROLES, SETTINGS, contents
from test_extend import Last, own_model

from jaxpersona.engine import stream
from jaxpersona.errors import UserError
from jaxpersona.persona.extract import extract_axis
from jaxpersona.runs import live
from jaxpersona.runs.run import Run
from jaxpersona.runs.seal import sha256

JUDGE = s.Scored(lambda role, key: 2 if key == "pos_p1_q1" else 3, "rules")


def run(folder, **options):
    return extract_axis(MODEL, ROLES, QUESTIONS, folder, **{"judge": JUDGE, "settings": SETTINGS,
                                                            "min_count": 2, **options})


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Return a folder of format 3, and the same run as versions before wrote it."""
    folder, means = tmp_path_factory.mktemp("older"), {}
    add = live.Live.add

    def kept(self, record, mean):
        means[self._head["role"], live.rollout_key(record)] = np.array(mean)
        add(self, record, mean)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live.Live, "add", kept)
        run(folder / "new")
    found = Run.read(folder / "new")
    old = folder / "old"
    for part in ("rollouts", "means", "scores"):
        (old / part).mkdir(parents=True)
    manifest = json.loads((folder / "new" / "run.json").read_text())
    arguments = {k: v for k, v in manifest["arguments"].items() if k != "share_prefix"}
    about = {k: v for k, v in manifest["model"].items() if k not in ("layers", "width")}
    (old / "run.json").write_text(json.dumps({
        "format": "jaxpersona-run 2", "model": {**about, "name": "tiny"},
        "arguments": {**arguments, "judge": "rules", "min_count": 10, "held_out": []},
        "roles": {role.name: "0" * 16 for role in ROLES}, "questions": "0" * 16,
        "numerics": manifest["numerics"]}))
    for role in ROLES[:-1]:  # the last one was not complete
        records = sorted(found.rollouts(role.name),
                         key=lambda r: (r["prompt_index"], r["question_index"]))
        for record in records:
            record.pop("reply_ids", None)
        text = "".join(json.dumps(r, ensure_ascii=False, sort_keys=True) + "\n" for r in records)
        (old / "rollouts" / f"{role.name}.jsonl").write_text(text)
        values = np.stack([means[role.name, live.rollout_key(r)] for r in records])
        write_tensors(old / "means" / f"{role.name}.safetensors", {"response": values},
                      {"rollouts": sha256(text.encode()), "role": role.name})
        if role.name != "default":
            (old / "scores" / f"{role.name}.json").write_text(json.dumps(
                {"scores": found.scores(role.name, "rules")}))
    return folder / "new", old


def test_only_what_the_old_run_lacks_is_generated(both, tmp_path, monkeypatch):
    new, old = both
    made = []
    task = stream.Stream._task
    monkeypatch.setattr(stream.Stream, "_task", lambda self, tag, *rest: made.append(
        tag[0]) or task(self, tag, *rest))
    asked = []
    judge = s.Scored(lambda role, key: asked.append(role) or JUDGE._score(role, key), "rules")
    before = contents(old)
    run(tmp_path / "run", judge=judge, take_from=old)
    assert set(made) == set(asked) == {"tutor"} and len(made) == 4
    assert contents(old) == before
    one, two = contents(new), contents(tmp_path / "run")
    assert set(one) == set(two)
    assert all(one[name] == two[name] for name in one if not name.startswith("rollouts/")
               and not name.startswith("samples/"))
    run(tmp_path / "run", take_from=old)  # and again
    assert contents(tmp_path / "run") == two


@pytest.mark.parametrize(("prompt", "question", "wanted"), [
    ("Be a ghost.", "How?", {"p1_q0", "p1_q1"}), ("Act as a ghost.", "Who?", {"p0_q1", "p1_q1"})])
def test_only_rollouts_of_equal_prompts_and_questions_are_taken(both, tmp_path, monkeypatch, prompt,
                                                                question, wanted):
    made = set()
    task = stream.Stream._task
    monkeypatch.setattr(stream.Stream, "_task", lambda self, tag, *rest: made.add(
        (tag[0], live.rollout_key(tag[1]))) or task(self, tag, *rest))
    roles = [ROLES[0], dataclasses.replace(ROLES[1], prompts=(ROLES[1].prompts[0], prompt)),
             *ROLES[2:]]
    extract_axis(MODEL, roles, [QUESTIONS[0], dataclasses.replace(QUESTIONS[1], text=question)],
                 tmp_path / "run", judge=JUDGE, settings=SETTINGS, min_count=2, take_from=both[1])
    assert {key.removeprefix("pos_") for role, key in made if role == "ghost"} == wanted


def test_another_judge_scores_the_old_rollouts(both, tmp_path):
    asked = []
    judge = s.Scored(lambda role, key: asked.append(role) or 3, "other")
    found = run(tmp_path / "run", judge=judge, take_from=both[1])
    assert len(asked) == 12 and found.counts["ghost"]["3"] == 4


def test_a_judge_that_is_loaded_last_waits_for_the_rollouts_that_are_missing(both, tmp_path):
    """It takes the place of the evaluated model, so it judges nothing before they are generated."""
    model = own_model()
    judge = Last(model, lambda role, key: 3, "other")
    found = extract_axis(model, ROLES, QUESTIONS, tmp_path / "run", judge=judge, min_count=2,
                         settings=SETTINGS, take_from=both[1])
    assert model.params.like.is_deleted()
    assert all(found.counts[role]["3"] == 4 for role in ("ghost", "pirate", "tutor"))
    for role in ("ghost", "tutor"):  # old rollouts have no token ids
        one, two = ([record["conversation"] for record in Run.read(folder).rollouts(role)]
                    for folder in (tmp_path / "run", both[0]))
        assert one == two


def test_what_does_not_fit_is_refused(both, tmp_path):
    _, old = both
    with pytest.raises(UserError, match="--take-from"):
        run(old)
    with pytest.raises(UserError, match="arguments.seed was 0, now 1"):
        run(tmp_path / "run", settings=dataclasses.replace(SETTINGS, seed=1), take_from=old)
    with pytest.raises(UserError, match="need no --take-from"):
        run(tmp_path / "run", take_from=both[0])
    with pytest.raises(UserError, match="share_prefix"):
        run(tmp_path / "run", settings=dataclasses.replace(SETTINGS, share_prefix=True),
            take_from=old)
    assert not (tmp_path / "run").exists()


def test_a_damaged_old_file_is_named(both, tmp_path):
    old = shutil.copytree(both[1], tmp_path / "old")
    path = old / "rollouts" / "ghost.jsonl"
    whole = path.read_bytes()
    for damaged in (whole.replace(b"Why?", b"Who?"), whole[:-9], b"\xff" + whole):
        path.write_bytes(damaged)
        with pytest.raises(UserError,
                           match=r"means/ghost\.safetensors: damaged \(does not belong to"):
            run(tmp_path / f"run{len(damaged)}", take_from=old)


def change(path, **fields):
    """Return a function that changes fields of the run's manifest."""
    def act(old):
        found = json.loads((old / "run.json").read_text())
        for name, value in fields.items():
            table = found if path is None else found[path]
            table.pop(name) if value is None else table.update({name: value})
        (old / "run.json").write_text(json.dumps(found))
    return act


def rollout(edit):
    """Return a function that changes the first line of ghost.jsonl, with its digest."""
    def act(old):
        path, means = old / "rollouts" / "ghost.jsonl", old / "means" / "ghost.safetensors"
        first, rest = path.read_text().split("\n", 1)
        path.write_text(f"{edit(first)}\n{rest}")
        tensors, about = read_tensors(means)
        write_tensors(means, dict(tensors), {**about, "rollouts": sha256(path.read_bytes())})
    return act


def record(**fields):
    return rollout(lambda line: json.dumps(json.loads(line) | fields))


def means(edit):
    """Return a function that changes the response means of the role "ghost"."""
    def act(old):
        path = old / "means" / "ghost.safetensors"
        tensors, about = read_tensors(path)
        write_tensors(path, {"response": edit(np.array(tensors["response"]))}, dict(about))
    return act


def filled(value):
    def edit(values):
        values[1, 0, 0] = value
        return values
    return edit


@pytest.mark.parametrize(("damage", "message"), [
    (change(None, model=[1]), r"run\.json: damaged \(model is not an object\)"),
    (change(None, arguments=0.5), r"run\.json: damaged \(arguments is not an object\)"),
    (change(None, numerics=None), r"run\.json: damaged \(numerics is not an object\)"),
    (change("model", fingerprint=None), "model.fingerprint was absent, now"),
    (change("arguments", seed=None), "arguments.seed was absent, now 0"),
    (rollout(lambda line: line[:9]), r"ghost\.jsonl: invalid JSON"),
    (rollout(lambda line: "[" * 5000), r"ghost\.jsonl: invalid JSON \(nested too deeply"),
    (rollout(lambda line: "[]"), r"ghost\.jsonl: damaged \(a line is not a rollout\)"),
    (record(question_index=True), "a line is not a rollout"),
    (record(prompt_index=2**70), "a line is not a rollout"),
    (record(conversation=[]), "a line is not a rollout"),
    (record(reply_ids=["x"]), "a line is not a rollout"),
    (means(lambda x: x[:, :, :-1]), r"means are float32 \[4, 3, 31\]; expected .* \[4, 3, 32\]"),
    (means(lambda x: x.swapaxes(1, 2)), r"means are float32 \[4, 32, 3\]"),
    (means(lambda x: x.astype(np.int32)), "means are int32"),
    (means(filled(np.nan)), r"ghost\.safetensors: damaged \(the response mean of rollout pos_p"),
    (means(filled(-np.inf)), "has non-finite values"),
])
def test_damage_behind_the_digests_is_named(both, tmp_path, damage, message):
    old = shutil.copytree(both[1], tmp_path / "old")
    damage(old)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", take_from=old)
