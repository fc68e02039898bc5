"""The progress display, streamed replies, saved contents and figures, with a given clock."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest

from jaxpersona.cli import support
from jaxpersona.errors import UserError


@pytest.fixture
def clock(monkeypatch):
    """The time that the display reads, as a list of one number."""
    now = [100.0]
    monkeypatch.setattr(support, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


@pytest.fixture
def printed(monkeypatch, capsys):
    """Return a function that lets the logging thread print one line, and the waited times."""
    targets, waited = [], []

    class Event:
        def wait(self, seconds):
            waited.append(seconds)
            return len(waited) % 2 == 0  # the second wait of each call ends the loop

        def set(self):
            """There is no thread to end."""

    def thread(target, **_):
        targets.append(target)
        return SimpleNamespace(start=lambda: None, join=lambda: None)

    monkeypatch.setattr(support, "threading", SimpleNamespace(Event=Event, Thread=thread))

    def one():
        targets[-1]()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return one, waited


def test_a_line_has_the_rate_and_the_time_left_since_the_first_report(clock, printed):
    """20 of 100 rollouts in 10 s leave 80 rollouts in 40 s; a later line uses the later time."""
    one, waited = printed
    with support.progress(log=True) as report:
        clock[0] = 107.0
        assert one() == "preparing: 7 s"
        clock[0] = 110.0
        report("rollouts", 1300, 1400, 0)
        assert one() == "rollouts 1,300/1,400"
        clock[0] = 120.0
        report("rollouts", 1320, 1400, 50_000)
        assert one() == "rollouts 1,320/1,400, 5,000 tokens/s, about 40 s left"
        clock[0] = 130.0
        assert one() == "rollouts 1,320/1,400, 2,500 tokens/s, about 80 s left"
        clock[0] = 140.0
        report("rollouts", 1400, 1400, 50_000)
        clock[0] = 145.0
        assert one() == "rollouts 1,400/1,400 complete; the next step has taken 5 s so far"
    assert set(waited) == {30.0} and not support._SHOWING


def test_a_line_about_judging_has_the_note_and_one_about_loading_has_gigabytes(clock, printed):
    """An empty note is omitted, other steps have no note, and a second model starts anew."""
    one, _ = printed
    said = ["cost: $1"]
    with support.progress(log=True, note=lambda: said[0]) as report:
        report("judging", 1, 3, 0)
        assert one() == "judging 1/3, cost: $1"
        clock[0] += 10
        report("judging", 2, 3, 40)
        assert one() == "judging 2/3, 4 tokens/s, cost: $1, about 10 s left"
        said[0] = ""
        assert one() == "judging 2/3, 4 tokens/s, about 10 s left"
        said[0] = "cost: $2"
        report("load", 0, 4_000_000_000, 0)
        clock[0] += 6
        report("load", 3_000_000_000, 4_000_000_000, 0)
        assert one() == "load 3.0/4.0 GB, about 2 s left"
        report("load", 0, 8_250_000_000, 0)
        clock[0] += 4
        report("load", 2_000_000_000, 8_000_000_000, 0)
        assert one() == "load 2.0/8.0 GB, about 12 s left"


@pytest.fixture
def bars(monkeypatch):
    """The display of a terminal; return the updates of its bars, and the total of each bar."""
    from rich import progress

    updates, totals = [], {}

    class Bar(contextlib.nullcontext):
        def __init__(self, *columns, console):
            super().__init__()
            assert len(columns) == 6

        def add_task(self, step, total, rate):
            totals[step] = total
            return step

        def update(self, task, completed, total, rate):
            updates.append((task, completed, total, rate))

    monkeypatch.setattr(progress, "Progress", Bar)
    monkeypatch.setattr(support, "console", lambda error: SimpleNamespace(is_interactive=error))
    return updates, totals


def test_a_bar_has_the_rate_in_tokens_bytes_or_the_note(clock, bars):
    """Rates count from the first report of a step, or of another model; inner blocks add bars."""
    updates, totals = bars
    with support.progress(note=lambda: "calls: 3") as report:
        with support.progress(log=True) as inner:
            assert inner is report
        for seconds, given, rate in (
                (0, ("rollouts", 10, 100, 0), ""), (5, ("rollouts", 20, 100, 5000), "1,000 tok/s"),
                (5, ("rollouts", 30, 200, 20_000), "2,000 tok/s"),
                (0, ("load", 0, 4, 0), "0.00 GB/s"), (2, ("load", 3 * 10**9, 4, 0), "1.50 GB/s"),
                (2, ("load", 0, 4, 0), "0.00 GB/s"), (2, ("load", 2 * 10**9, 4, 0), "1.00 GB/s"),
                (0, ("judging", 1, 9, 7), "calls: 3")):
            clock[0] += seconds
            report(*given)
            assert updates[-1] == (*given[:3], rate)
    assert totals == {"rollouts": 100, "load": 4, "judging": 9} and not support._SHOWING
    with support.progress() as report:
        report("judging", 1, 9, 0)
    assert updates[-1] == ("judging", 1, 9, "")


@pytest.mark.parametrize(("first", "terminal", "log", "silent"), [
    (True, False, False, True), (False, False, True, True), (False, True, True, True),
    (True, True, False, False), (True, False, True, False)])
def test_only_the_first_process_shows_progress(monkeypatch, bars, printed, first, terminal, log,
                                               silent):
    """Without a terminal, the display also needs `log`."""
    monkeypatch.setattr("jaxpersona.distributed.processes.first", lambda: first)
    monkeypatch.setattr(support, "console",
                        lambda error: SimpleNamespace(is_interactive=terminal))
    with support.progress(log=log) as report:
        assert (report is support._silent) == silent
        assert support._SHOWING == ([] if silent else [report])


@pytest.fixture
def spoken(monkeypatch):
    """The written pieces and the calls of the spinner, in order."""
    seen = []
    monkeypatch.setattr(support, "write", seen.append)

    def use(terminal):
        status = SimpleNamespace(start=lambda: seen.append("START"),
                                 stop=lambda: seen.append("STOP"))
        monkeypatch.setattr(support, "console", lambda error: SimpleNamespace(
            is_interactive=terminal and error, status=lambda text: status))
        return seen

    return use


@pytest.mark.parametrize(("terminal", "wanted"), [
    (True, ["START", "", "STOP", "a", "", "b", "\n"]), (False, ["", "a", "", "b", "\n"])])
def test_a_spinner_ends_at_the_first_text_of_a_reply(spoken, terminal, wanted):
    """An empty piece does not end it, and a reply ends with a newline."""
    seen = spoken(terminal)
    support.stream(["", "a", "", "b"])
    assert seen == wanted


def test_a_spinner_ends_if_a_reply_fails_or_is_empty(spoken):
    """The error is raised after the spinner has stopped."""
    def broken():
        yield ""
        raise UserError("broken")

    seen = spoken(True)
    with pytest.raises(UserError, match="broken"):
        support.stream(broken())
    assert seen == ["START", "", "STOP"]
    del seen[:]
    support.stream([])
    assert seen == ["START", "STOP", "\n"]


def test_loading_reports_its_bytes_in_a_display_with_lines(monkeypatch):
    """The step is `load`, with the loaded and the total number of bytes and no tokens."""
    seen = []

    @contextlib.contextmanager
    def display(log=False, note=None):
        yield lambda *given: seen.append((log, given))

    monkeypatch.setattr(support, "progress", display)
    monkeypatch.setattr("jaxpersona.ckpts.loading.load",
                        lambda source, *, progress, **_: progress(3, 5))
    support.open_model("m", None)
    assert seen == [(True, ("load", 3, 5, 0))]


@pytest.mark.parametrize(("counts", "axis", "wanted"), [
    ((0, 0, 0), False, "its settings"), ((1234, 0, 0), False, "1,234 rollouts"),
    ((1234, 5678, 2), False, "1,234 rollouts and 5,678 verdicts (complete roles: 2)"),
    ((5, 7, 0), False, "5 rollouts and 7 verdicts"),
    ((9, 0, 3), True, "9 rollouts (complete roles: 3) and the axis")])
def test_what_a_stopped_run_has_kept_is_told(monkeypatch, tmp_path, counts, axis, wanted):
    """A folder without a manifest has nothing."""
    monkeypatch.setattr("jaxpersona.runs.status.kept", lambda folder: counts)
    assert support.kept_of(tmp_path) == "nothing was written"
    (tmp_path / "run.json").touch()
    if axis:
        (tmp_path / "axis.safetensors").touch()
    assert support.kept_of(tmp_path) == (f"{tmp_path} contains {wanted}; run the same command to "
                                         "resume")


def test_the_figures_of_a_run_have_its_data(monkeypatch, tmp_path, capsys):
    """After a figure that cannot be drawn, the result is False."""
    from jaxpersona.report import figures

    seen = []
    for name in ("roles_on_axis", "components", "variance"):
        monkeypatch.setattr(figures, name, lambda *given, name=name: seen.append((name, *given)))
    found = SimpleNamespace(analysis="analysis", default="default")
    assert support.draw_run(tmp_path, found, 4, ["bee"]) is True
    assert seen == [("roles_on_axis", tmp_path / "roles.png", found, 4, ["bee"]),
                    ("components", tmp_path / "pca.png", "analysis", 4, "default"),
                    ("variance", tmp_path / "variance.png", "analysis", 4)]

    def fail(*_):
        raise UserError("too few roles")

    monkeypatch.setattr(figures, "components", fail)
    assert support.draw_run(tmp_path, found, 4, []) is False
    assert capsys.readouterr().err == "not all figures could be drawn: too few roles\n"


@pytest.mark.parametrize(("text", "kept"), [
    ("all", None), ("2", 2), ("999999999", 999999999), ("1", UserError), ("0", UserError),
    ("1000000000", UserError), ("-3", UserError), ("", UserError), ("ALL", UserError),
    ("2.5", UserError)])
def test_a_number_of_stored_means_is_at_least_two(text, kept):
    """`all` stands for every reply, and a number has at most nine digits."""
    if kept is UserError:
        with pytest.raises(UserError, match="keep.means is"):
            support.kept_means(text)
    else:
        assert support.kept_means(text) == kept


@pytest.mark.parametrize(("seconds", "wanted"), [
    (99.4, "99 s"), (100, "2 min"), (5999, "100 min"), (6000, "1.7 h"), (36_000, "10.0 h")])
def test_a_duration_changes_its_unit_at_100_seconds_and_100_minutes(seconds, wanted):
    """Seconds and minutes are whole numbers, hours have one decimal."""
    assert support._duration(seconds) == wanted
