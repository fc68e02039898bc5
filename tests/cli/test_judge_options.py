"""Judges made from the options of the command line, and their errors."""

from __future__ import annotations

import pathlib

import pytest

from jaxpersona.cli import judges
from jaxpersona.cli.judges import JudgeOptions, choose, closed, of_model, opened, rubric_of
from jaxpersona.errors import UserError
from jaxpersona.judges.human import HumanJudge
from jaxpersona.judges.judges import NoJudge
from jaxpersona.judges.rubric import ROLES, Rubric
from jaxpersona.organism.method import RuleJudge


@pytest.fixture
def made(monkeypatch):
    """The named arguments of each endpoint judge; no client is created."""
    seen = []
    monkeypatch.setattr("jaxpersona.judges.endpoint.Endpoint", lambda *a, **k: k)
    monkeypatch.setattr("jaxpersona.judges.http.HttpJudge",
                        lambda endpoint, file, **named: seen.append((endpoint, file, named)))
    return seen


def http(folder, **options):
    return opened(choose("http:m", JudgeOptions(**options), own=False), folder)


@pytest.mark.parametrize(("options", "wanted"), [
    ({"timeout": 0.0}, "--judge-timeout is 0.0; it must be positive and finite"),
    ({"timeout": float("inf")}, "--judge-timeout is inf"),
    ({"max_tokens": 0}, "--judge-max-tokens is 0; it must be positive"),
    ({"temperature": 2.1}, "--judge-temperature is 2.1; give 0 to 2"),
    ({"temperature": -0.1}, "--judge-temperature is -0.1"),
    ({"batch": True, "batch_size": 1_000_001}, "--judge-batch-size is 1000001; give 1 to 1000000"),
    ({"price": "1,2,3"}, "--judge-price is '1,2,3'; give the prices in USD per million prompt"),
    ({"price": "a,b"}, "--judge-price is 'a,b'"), ({"price": "-1,2"}, "--judge-price is '-1,2'"),
    ({"price": "1,inf"}, "--judge-price is '1,inf'"), ({"price": ""}, "--judge-price is ''"),
    ({"batch": True, "batch_price": "1,nan"}, "--judge-batch-price is '1,nan'"),
])
def test_an_option_of_an_endpoint_out_of_range_is_refused(made, tmp_path, options, wanted):
    """The error names the option and its value."""
    with pytest.raises(UserError) as caught:
        http(tmp_path, **options)
    assert str(caught.value).startswith(wanted) and not made


def test_the_ends_of_the_ranges_are_allowed(made, tmp_path):
    """A temperature of 2, a price of 0, the largest batch, and short answers."""
    http(tmp_path, temperature=2.0, price="0,0", max_tokens=1, timeout=0.001, batch=True,
         batch_size=1_000_000, batch_price=" 0.5 , 1.5 ")
    http(tmp_path, temperature=0.0, batch=True, batch_size=1)
    (endpoint, _, named), (_, _, other) = made
    assert endpoint["temperature"] == 2.0 and endpoint["max_tokens"] == 1
    assert named["price"] == (0.0, 0.0)
    assert (named["batch"].size, named["batch"].price) == (1_000_000, (0.5, 1.5))
    assert (other["batch"].size, other["batch"].price) == (1, None)


def test_an_endpoint_judge_has_the_defaults_of_the_help(made, tmp_path):
    """The file of the verdicts is in the run folder, and there are no limits."""
    http(tmp_path, url="http://h/v1")
    assert made == [({"url": "http://h/v1", "key_env": "OPENAI_API_KEY", "timeout": 60.0,
                      "max_tokens": 10, "temperature": 0.0}, tmp_path / "verdicts.jsonl",
                     {"rubric": ROLES, "concurrency": 8, "rpm": None, "tpm": None, "budget": None,
                      "price": None, "batch": None})]
    assert JudgeOptions().batch_size == 50_000


def test_a_rubric_is_the_text_of_its_file(made, tmp_path):
    """Without white space around it; the judges of all kinds get it."""
    file = tmp_path / "r.txt"
    file.write_text("\n {question} {answer} é 0-3?\n\n", "utf-8")
    wanted = Rubric(template="{question} {answer} é 0-3?")
    assert rubric_of(choose("self", JudgeOptions(rubric=file), own=False)) == wanted
    http(tmp_path, rubric=file)
    assert made[0][2]["rubric"] == wanted
    assert rubric_of(choose("self", JudgeOptions(), own=False)) is ROLES
    file.write_bytes(b"{question} {answer} \xff")
    with pytest.raises(UserError, match="r.txt is not UTF-8; save it as UTF-8"):
        http(tmp_path, rubric=file)


def test_simple_judges_need_no_file(tmp_path):
    """Judges that need a model are made later."""
    assert isinstance(opened(choose("none", JudgeOptions(), own=False), tmp_path), NoJudge)
    assert isinstance(opened(choose("rules", JudgeOptions(), own=True), tmp_path), RuleJudge)
    for name in ("self", "model:m"):
        assert opened(choose(name, JudgeOptions(), own=False), tmp_path) is None


def test_the_file_of_a_person_is_read_and_tried_before_the_run(tmp_path):
    """A new file is not created yet, and a damaged or unwritable one is refused."""
    file = tmp_path / "mine.CSV"
    judge = opened(choose(f"human:{file}", JudgeOptions(), own=False), tmp_path)
    assert isinstance(judge, HumanJudge) and judge.path == file and not file.exists()
    file.write_text("item,score\na,1\n")
    with pytest.raises(UserError, match="has no column 'digest'"):
        opened(choose(f"human:{file}", JudgeOptions(), own=False), tmp_path)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "link.csv").symlink_to(tmp_path / "none.csv")
    for name, wanted in (("folder.csv", "folder"), ("link.csv", "--judge human is .*link.csv, "
                                                    "not a regular file")):
        with pytest.raises(UserError, match=wanted):
            opened(choose(f"human:{tmp_path / name}", JudgeOptions(), own=False), tmp_path)


@pytest.mark.parametrize(("judge", "own", "wanted"), [
    ("rules", False, "judge is 'rules'; choose self, model:NAME, http:MODEL, human:FILE.csv or "
                     "none (rules supports only the roles of mini)"),
    ("self:x", True, "judge is 'self:x'; choose rules, self, model:NAME, http:MODEL, "
                     "human:FILE.csv or none"),
    ("model", False, "judge is 'model'; choose self,"), ("human:", False, "judge is 'human:'"),
    (":x", False, "judge is ':x'"), ("", False, "judge is ''")])
def test_an_unknown_judge_is_refused_with_the_known_ones(judge, own, wanted):
    """`rules` is offered for the roles of mini only."""
    with pytest.raises(UserError) as caught:
        choose(judge, JudgeOptions(), own=own)
    assert str(caught.value).startswith(wanted)


@pytest.mark.parametrize(("judge", "options", "after", "wanted"), [
    ("none", {"rubric": pathlib.Path("r")}, False, "--judge-rubric is given, but the judge is "
     "'none'; use it only with self or model:… or http:…"),
    ("http:m", {}, True, "--judge-after is given, but the judge is 'http:m'; use it only with "
     "model:…"),
    ("model:m", {"batch_size": 5}, False, "--judge-batch-size is given, but the judge is 'model:m'"
     "; use it only with http:…"),
    ("http:m", {"batch": True, "tpm": 5.0}, False, "--judge-tpm is given together with "
     "--judge-batch, which does not use it; omit one of them")])
def test_an_option_of_another_judge_is_refused_with_its_judges(judge, options, after, wanted):
    """The rubric applies to three judges, and --judge-after to one."""
    with pytest.raises(UserError) as caught:
        choose(judge, JudgeOptions(**options), own=False, after=after)
    assert str(caught.value) == wanted


def test_a_name_may_contain_colons():
    """The kind ends at the first one."""
    found = choose("http:owner/model:free", JudgeOptions(), own=False)
    assert (found.kind, found.argument) == ("http", "owner/model:free")


class Digits:
    """A digit judge that records what happens to it."""

    def __init__(self, model, *, rubric):
        self.model, self.rubric, self.checked = model, rubric, []

    def identify(self, model):
        self.checked.append(model)


def test_a_judging_model_is_released_until_it_is_used(monkeypatch):
    """It is loaded once for a check; at its use, the evaluated model is released first."""
    steps = []
    monkeypatch.setattr("jaxpersona.judges.digits.DigitJudge", Digits)
    monkeypatch.setattr("jaxpersona.models.model.release", lambda m: steps.append(f"release {m}"))

    def load():
        steps.append("load")
        return "judge"

    choice = choose("model:m", JudgeOptions(), own=False, after=True)
    judge = of_model(choice, load, lambda: "target")
    assert steps == ["load", "release judge"] and judge.checked == ["judge"]
    assert judge.model() == "judge" and steps[2:] == ["release target", "load"]
    del steps[:]
    judge = of_model(choose("model:m", JudgeOptions(), own=False), load, lambda: "target")
    assert steps == ["load"] and judge.model == "judge" and not judge.checked
    assert judge.rubric is ROLES


def test_a_judge_is_closed_also_after_an_error():
    """A judge without files has nothing to close."""
    calls = []

    class Open(NoJudge):
        def close(self):
            calls.append(1)

    with closed(Open()), closed(NoJudge()):
        assert not calls
    with pytest.raises(UserError), closed(Open()):
        raise UserError("x")
    assert calls == [1, 1]


def test_rates_are_divided_among_processes():
    """No limit stays no limit."""
    assert judges._part(None, 3) is None and judges._part(9.0, 3) == 3.0
