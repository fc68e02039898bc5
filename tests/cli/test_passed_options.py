"""Every option of `axis`, `runs` and `judge` reaches the function behind the command."""

from __future__ import annotations

import json
import pathlib
import types

import pytest
import support as s

import jaxpersona as jp
from jaxpersona.cli import axis, judges, support
from jaxpersona.data import texts
from jaxpersona.data.texts import Question, Role
from jaxpersona.errors import UserError
from jaxpersona.judges.judges import NoJudge
from jaxpersona.organism import method
from jaxpersona.organism.method import RuleJudge
from jaxpersona.persona.exporting import Exported
from jaxpersona.persona.importing import Imported
from jaxpersona.runs.rollouts import Settings

NAMES = ["ant", "bee", "cat", "dog"]
LOADED = types.SimpleNamespace(name="m", template=True)


@pytest.fixture
def opened(monkeypatch):
    """The arguments of each call of `open_model`, which loads nothing."""
    seen = []
    monkeypatch.setattr("jaxpersona.cli.support.open_model", lambda *a: seen.append(a) or LOADED)
    return seen


@pytest.fixture
def called(monkeypatch):
    """Return a function that replaces another one, and the arguments of its calls."""
    def replace(name, result=None):
        seen = []

        def function(*given, **named):
            seen.append((given, named))
            if result is None:
                raise jp.UserError("enough")
            return result

        monkeypatch.setattr(name, function)
        return seen

    return replace


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return s.write_texts(tmp_path, [Role(name, (f"Be {name}, {{model_name}}.",), "")
                                    for name in NAMES],
                         [Question(i, f"Who {i}?") for i in range(9)])


@pytest.mark.parametrize(("more", "name"), [
    (["--take-from", "old"], "jaxpersona.persona.extract.extract_axis"),
    (["--dry-run", "--sample-seconds", "2"], "jaxpersona.persona.forecast.forecast")])
def test_the_options_of_axis_reach_the_run_and_its_forecast(folder, opened, called, more, name):
    seen = called(name)
    assert s.run_command([
        "axis", "--model", "models/Some-7B/", "--roles", "roles", "--questions", "questions.jsonl",
        "--limit", "3", "--limit-questions", "8", "--samples", "3", "--max-new-tokens", "7",
        "--temperature", "0.5", "--top-p", "0.6", "--batch-size", "4", "--seed", "11",
        "--min-count", "2", "--held-out", "bee", "--keep-means", "5", "--share-prefix", "--redo",
        "cat", "--redo", "ant", "--overwrite", "--judge", "none", "--dtype", "float16",
        "--adapter", "lora", "--mesh", "data=2", "--out", "out", "--json", "--precision", "0.9",
        "--rounds", "6, 8", *more]) == 2
    assert opened == [("models/Some-7B/", "float16", "data=2", pathlib.Path("lora"))]
    ((model, roles, questions, out), named), = seen
    assert model is LOADED and out == pathlib.Path("out")
    assert [role.name for role in roles] == ["default", "ant", "bee", "cat"]
    assert {role.name: role.prompts for role in roles}["ant"] == ("Be ant, Some-7B.",)
    assert [question.text for question in questions] == [f"Who {i}?" for i in range(8)]
    assert isinstance(named.pop("judge"), NoJudge)
    wanted = {"settings": Settings(temperature=0.5, top_p=0.6, max_new_tokens=7, samples=3,
                                   batch_size=4, seed=11, share_prefix=True),
              "min_count": 2, "held_out": ["bee"], "keep_means": 5, "redo": ["cat", "ant"],
              "overwrite": True, "precision": 0.9, "rounds": [6, 8]}
    wanted |= {"sample_seconds": 2} if "forecast" in name else {"take_from": pathlib.Path("old")}
    assert {key: named[key] for key in wanted} == wanted


@pytest.mark.parametrize(("more", "length", "judge"), [
    ([], 64, RuleJudge), (["--roles", "roles"], 64, NoJudge),
    (["--model", "other", "--roles", "roles"], 512, NoJudge)])
def test_the_defaults_of_axis_are_those_of_its_help(folder, opened, called, more, length, judge):
    seen = called("jaxpersona.persona.extract.extract_axis")
    assert s.run_command(["axis", "--out", "out", *more]) == 2
    (_, named), = seen
    assert named["settings"] == Settings(temperature=0.7, top_p=0.9, max_new_tokens=length,
                                         samples=1, batch_size=32, seed=0)
    assert type(named["judge"]) is judge
    assert (named["min_count"], named["keep_means"], named["redo"]) == (10, 16, [])
    assert (named["precision"], named["rounds"]) == (None, None)


def test_the_numbers_of_the_paper(folder, opened, called):
    seen = called("jaxpersona.persona.extract.extract_axis")
    assert s.run_command(["axis", "--model", "other", "--paper", "--min-count", "50"]) == 2
    ((_, roles, questions, _), named), = seen
    assert (len(roles), len(questions)) == (276, 240)
    assert {len(role.prompts) for role in roles} == {5}
    assert named["settings"] == Settings(temperature=0.7, top_p=0.9, max_new_tokens=512, samples=1)
    assert (named["min_count"], named["precision"]) == (50, None)


@pytest.mark.parametrize(("more", "said"), [
    (["--paper", "--min-count", "10"], "--min-count is 10, but --paper sets it to 50; omit one"),
    (["--precision", "0.9", "--rounds", "9" * 5000], "--rounds is '9999"),
    (["--keep-means", "9" * 5000], "--keep-means is '9999"),
    (["--paper", "--samples", "2"], "--samples is 2, but --paper sets it to 1; omit one"),
    (["--paper", "--precision", "0.9"], "--precision is 0.9, but --paper omits it"),
    (["--paper", "--limit-questions", "9"], "--limit-questions is 9, but --paper omits it"),
    (["--limit-questions", "0"], "--limit-questions is 0; give an integer, at least 1"),
    (["--limit", "-1"], "--limit-roles is -1; give an integer, at least 0"),
    (["--precision", "1"], "precision is 1.0; give a reliability between 0 and 1"),
    (["--rounds", "8"], "rounds is [8], but precision is None"),
    (["--precision", "0.9", "--rounds", "8,x"], "--rounds is '8,x'; give numbers of questions"),
    (["--precision", "0.9", "--rounds", "5"], "rounds contains 5; give even numbers"),
    (["--precision", "0.9", "--limit-questions", "3"], "precision needs at least 4 questions"),
    (["--model", "m", "--precision", "0.9", "--judge", "model:j", "--judge-after"],
     "the judge scores only after all rollouts (--judge-after), but precision needs scores")])
def test_mistakes_about_the_number_of_rollouts_are_found_before_a_model_is_loaded(
        folder, opened, capsys, more, said):
    assert s.run_command(["axis", "--out", "out", *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not opened


def test_the_texts_of_a_run_are_those_that_the_options_select(monkeypatch):
    loaded = [Role("default", ("",), ""), Role("ghost", ("Be a ghost.",), "")]
    seen = []
    monkeypatch.setattr(texts, "load_roles",
                        lambda path, *, model_name: seen.append((path, model_name)) or loaded)
    nine = method.held_out()
    assert len(nine) == 9

    def of(model="mini", roles=None, questions=None, limit=None, few=None, held=""):
        return axis._texts(model, roles, questions, limit, few, held,
                           model == "mini" and roles is None)

    cast, asked, held = of()
    assert (cast, asked, held) == (method.roles(), method.questions(8), nine)
    assert of(held="bard,,x")[2] == ["bard", "x"]
    # mini with other roles has the questions of the package, as every other model has
    for given in ({"roles": "data"}, {"model": "owner/Some-7B:q4"}, {"questions": "data"}):
        cast, asked, held = of(**given)
        assert len(asked) == 240 and (cast == loaded) == ("questions" not in given)
        assert held == (nine if "questions" in given else [])
    assert seen == [(None, "mini"), (None, "q4")]
    names = [role.name for role in method.roles() if role.name != "default"]
    cast, asked, held = of(limit=4, few=3)
    assert [role.name for role in cast] == ["default", *names[:4]]
    assert asked == method.questions(8)[:3]
    assert held == [name for name in nine if name in names[:4]]  # those that are left
    assert of(limit=4, held="bard")[2] == ["bard"]
    assert [role.name for role in of(limit=0)[0]] == ["default"]
    for option, given in (("roles is -1", {"limit": -1}), ("questions is 0", {"few": 0})):
        with pytest.raises(UserError, match=f"--limit-{option}; give an integer, at least"):
            of(**given)


def test_limited_roles_are_a_mixed_sample_that_a_larger_one_contains():
    def of(limit=None, named=None, name=None):
        cast = axis._texts("owner/Some-7B", None, None, limit, 1, "", False, named, name)[0]
        assert sum(role.name == "default" for role in cast) == 1
        return [role.name for role in cast if role.name != "default"], cast

    everyone = of()[0]
    few, more = of(12)[0], of(40)[0]
    assert len(few) == 12 and len(more) == 40 and set(few) < set(more)
    assert more == sorted(more) and of(10**6)[0] == everyone and of(0)[0] == []
    # not the alphabet's first: the sample has names from each half of the list
    assert 10 < sum(everyone.index(name) < len(everyone) / 2 for name in more) < 30
    assert of(named="pirate, analyst")[0] == ["analyst", "pirate"]
    assert of(limit=1, named="pirate,analyst,ghost")[0][0] in ("pirate", "analyst", "ghost")
    for unknown in ("pirat", "zzzz", ""):
        with pytest.raises(UserError, match=f"'{unknown}' is not the name of a role"):
            of(named=unknown)
    with pytest.raises(UserError, match="similar names: pirate"):
        of(named="pirat")
    prompts = {p for role in of(0, name="SmolLM2")[1] for p in role.prompts}
    assert any("SmolLM2" in prompt for prompt in prompts)
    assert any("Some-7B" in prompt for role in of(0)[1] for prompt in role.prompts)


def test_a_judging_model_is_opened_like_the_evaluated_one(folder, opened, called, monkeypatch):
    monkeypatch.setattr(axis, "of_model", lambda choice, load, target: (load(), target()) and
                        NoJudge())
    called("jaxpersona.persona.extract.extract_axis")
    assert s.run_command(["axis", "--model", "m", "--roles", "roles", "--questions",
                          "questions.jsonl", "--min-count", "1", "--judge", "model:owner/j",
                          "--dtype", "float16", "--mesh", "data=2", "--adapter", "lora"]) == 2
    # the adapter belongs to the evaluated model alone
    assert opened == [("m", "float16", "data=2", pathlib.Path("lora")),
                      ("owner/j", "float16", "data=2")]


def test_the_options_of_an_export_reach_it(called, tmp_path, capsys):
    found = Exported(tmp_path, 1234, 20, 3, ["a", "b"], ["a note"])
    seen = called("jaxpersona.persona.exporting.export_reference", found)
    command = ["runs", "export", "run", str(tmp_path / "new"), "--reference"]
    assert s.run_command(command) == 0
    assert capsys.readouterr().out == (f"{tmp_path / 'new'}: 1,234 rollouts, 20 scores, 3 response "
                                       "means, axis of 2 roles\n  a note\n")
    assert s.run_command([*command, "--activations", "none", "--judge", "j", "--min-count", "7",
                          "--fold-system", "--incomplete", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "folder": str(tmp_path / "new"), "rollouts": 1234, "scores": 20, "means": 3,
        "roles_in_axis": ["a", "b"], "notes": ["a note"]}
    for (given, named), wanted in zip(seen, (
            ("all", None, None, False, False), ("none", "j", 7, True, True)), strict=True):
        assert given == (pathlib.Path("run"), tmp_path / "new")
        assert tuple(named[key] for key in ("activations", "judge", "min_count", "fold_system",
                                            "incomplete")) == wanted
    (tmp_path / "file").touch()
    assert s.run_command([*command[:3], str(tmp_path / "file"), "--reference"]) == 2
    assert f"error: FOLDER is {tmp_path / 'file'}, a file" in capsys.readouterr().err


def test_the_options_of_an_import_reach_it(folder, opened, called, capsys):
    found = Imported(pathlib.Path("run"), {"a": 5, "b": 6}, {"a": 3, "b": 1}, {"a": 2, "b": 0},
                     None, ["a note"])
    seen = called("jaxpersona.persona.importing.import_reference", found)
    assert s.run_command(["runs", "import", "source", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "run": "run", "roles": 2, "rollouts": 11, "scores": 4, "means": 2, "roles_in_axis": [],
        "notes": ["a note"]}
    assert s.run_command([
        "runs", "import", "source", "run", "--model", "owner/Some-7B", "--roles", "roles",
        "--judge", "j", "--min-count", "7", "--held-out", "bee,cat", "--keep-means", "all",
        "--max-new-tokens", "9", "--temperature", "0.5", "--top-p", "0.6", "--batch-size", "4",
        "--seed", "11", "--overwrite", "--dtype", "float16", "--adapter", "lora"]) == 0
    assert "run: 2 roles, 11 rollouts, 4 scores, 2 response means\n" in capsys.readouterr().out
    (given, bare), (_, named) = seen
    assert given == (pathlib.Path("source"), pathlib.Path("run"))
    assert bare["settings"] == Settings(0.7, 0.9, 512, 1, 32, 0)
    assert (bare["model"], bare["roles"], bare["judge"], bare["min_count"], bare["held_out"],
            bare["keep_means"], bare["overwrite"]) == (None, None, "imported", 50, [], 16, False)
    assert opened == [("owner/Some-7B", "float16", None, pathlib.Path("lora"))]
    assert named["settings"] == Settings(temperature=0.5, top_p=0.6, max_new_tokens=9, samples=1,
                                         batch_size=4, seed=11)
    assert (named["model"], named["judge"], named["min_count"], named["held_out"],
            named["keep_means"], named["overwrite"]) == (LOADED, "j", 7, ["bee", "cat"], None, True)
    assert named["roles"][0].prompts == ("Be ant, Some-7B.",)
    for option in ("--dtype", "--adapter"):
        assert s.run_command(["runs", "import", "source", "run", option, "int8"]) == 2
        assert "apply to a model; give the model with --model" in capsys.readouterr().err


def test_the_options_of_an_endpoint_reach_its_judge(monkeypatch, tmp_path):
    import jax

    made = []
    monkeypatch.setattr("jaxpersona.judges.endpoint.Endpoint", lambda *a, **k: (a, k))
    monkeypatch.setattr("jaxpersona.judges.http.HttpJudge", lambda *a, **k: made.append((a, k)))
    options = judges.JudgeOptions(url="http://h/v1", key_env="K", budget="11calls", price="1,2",
                                  concurrency=3, rpm=60.0, tpm=900.0, timeout=5.0, temperature=0.5,
                                  max_tokens=4)
    for cache, shares, index in ((None, 1, 0), (tmp_path / "c.jsonl", 3, 0), (None, 3, 2)):
        # several processes share the budget and the rates, and each has a journal
        monkeypatch.setattr("jaxpersona.distributed.processes.joined", lambda n=shares: n > 1)
        monkeypatch.setattr("jaxpersona.distributed.processes.index", lambda i=index: i)
        monkeypatch.setattr(jax, "process_count", lambda n=shares: n)
        kept = vars(options) | {"cache": cache}
        judges.opened(judges.choose("http:m", judges.JudgeOptions(**kept), own=False), tmp_path)
    ends = {"url": "http://h/v1", "key_env": "K", "timeout": 5.0, "max_tokens": 4,
            "temperature": 0.5}
    files = [tmp_path / name for name in ("verdicts.jsonl", "c.jsonl", "verdicts.2.jsonl")]
    for ((endpoint, file), named), wanted, share in zip(made, files, (1, 3, 3), strict=True):
        assert endpoint == (("m",), ends) and file == wanted
        assert (named["concurrency"], named["price"]) == (3, (1.0, 2.0))
        assert (named["rpm"], named["tpm"]) == (60 / share, 900 / share)
        assert named["budget"].calls == 11 // share


def test_a_mesh_has_the_sizes_of_the_option(monkeypatch):
    monkeypatch.setattr("jaxpersona.distributed.sharding.make_mesh", lambda *a, **k: (a, k))
    monkeypatch.setattr("jaxpersona.ckpts.loading.load", lambda source, *, progress, **k: (source,
                                                                                           k))
    lora = pathlib.Path("lora")
    assert support.open_model("m", "int8", "fsdp=4,data=3,model=2", lora) == (
        "m", {"dtype": "int8", "mesh": ((3, 2), {"fsdp": 4}), "adapter": lora})
    assert support.open_model("m", None, "fsdp=4")[1]["mesh"] == ((1, 1), {"fsdp": 4})
    assert support.open_model("m", None) == ("m", {"dtype": None, "mesh": None, "adapter": None})
