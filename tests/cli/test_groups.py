"""Options that several commands share as the fields of a dataclass."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from jaxpersona.cli import axis, chat, generate, judge_run
from jaxpersona.cli.edits import EditOptions
from jaxpersona.cli.groups import grouped
from jaxpersona.cli.judges import Choice, JudgeOptions, choose
from jaxpersona.errors import UserError


@dataclasses.dataclass
class Size:
    rows: Annotated[int, typer.Option("--rows", help="How many rows.")] = 2
    names: Annotated[list[str] | None, typer.Option("--name")] = None
    area: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        self.area = self.rows * 10


def app(seen: list) -> typer.Typer:
    made = typer.Typer()

    @made.command()
    @grouped
    def run(word: Annotated[str, typer.Argument()], first: Size = Size(),  # noqa: B008
            loud: Annotated[bool, typer.Option("--loud")] = False) -> None:
        """Run it."""
        seen.append((word, first, loud))

    return made


def test_a_command_gets_one_object_with_the_values_of_its_options():
    seen: list = []
    run = CliRunner()
    assert run.invoke(app(seen), ["a"]).exit_code == 0
    assert run.invoke(app(seen), ["b", "--rows", "5", "--loud", "--name", "x", "--name", "y"]
                      ).exit_code == 0
    (_, plain, quiet), (word, given, loud) = seen
    assert (plain.rows, plain.names, plain.area, quiet) == (2, None, 20, False)
    assert (word, given.rows, given.names, given.area, loud) == ("b", 5, ["x", "y"], 50, True)
    assert run.invoke(app(seen), ["a", "--rows", "many"]).exit_code == 2
    assert run.invoke(app(seen), ["a", "--area", "1"]).exit_code == 2
    shown = run.invoke(app(seen), ["--help"]).output
    assert "How many rows." in shown and "Run it." in shown
    assert shown.index("--rows") < shown.index("--loud")


@pytest.mark.parametrize("kind, commands", [
    (JudgeOptions, (axis.axis, judge_run.run)), (EditOptions, (generate.generate, chat.chat)),
], ids=["judge", "edits"])
def test_every_field_is_an_option_with_help_and_the_default_of_the_field(kind, commands):
    for command in commands:
        made = typer.Typer()
        made.command()(command)
        options = {parameter.opts[0]: parameter
                   for parameter in typer.main.get_command(made).params}
        for field in dataclasses.fields(kind):
            prefix = "--judge-" if kind is JudgeOptions and field.name != "budget" else "--"
            option = options[prefix + field.name.replace("_", "-")]
            assert option.default == field.default and option.help


def test_a_choice_has_the_values_of_the_options_and_refuses_those_of_other_judges():
    found = choose("http:some", JudgeOptions(rpm=3.0, budget="5calls"), own=False)
    assert isinstance(found, Choice)
    assert (found.judge, found.kind, found.argument, found.rpm, found.budget, found.after) == (
        "http:some", "http", "some", 3.0, "5calls", False)
    assert choose("model:m", JudgeOptions(), own=False, after=True).after
    for judge, options, after, name in (
            ("none", JudgeOptions(rpm=3.0), False, "--judge-rpm"),
            ("self", JudgeOptions(budget="5calls"), False, "--budget"),
            ("model:m", JudgeOptions(key_env="K"), False, "--judge-key-env"),
            ("human:x.csv", JudgeOptions(rubric=pathlib.Path("r")), False, "--judge-rubric"),
            ("http:m", JudgeOptions(), True, "--judge-after")):
        with pytest.raises(UserError, match=f"{name} is given, but the judge is '{judge}'"):
            choose(judge, options, own=False, after=after)
    # with one rubric for all roles, no role needs its own
    for judge, needs in (("self", True), ("model:m", True), ("http:m", True), ("none", False),
                         ("human:x.csv", False)):
        assert choose(judge, JudgeOptions(), own=False).reads_eval_prompt == needs
        if needs:
            given = JudgeOptions(rubric=pathlib.Path("r"))
            assert not choose(judge, given, own=False).reads_eval_prompt
