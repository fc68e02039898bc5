"""The numbers of a forecast that follow from the texts alone, and its lines."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import support as s

from jaxpersona.data.texts import Question, Role
from jaxpersona.engine.pace import Pace
from jaxpersona.errors import UserError
from jaxpersona.judges.judges import NoJudge
from jaxpersona.persona import forecast as module
from jaxpersona.persona.forecast import Forecast, describe, forecast
from jaxpersona.runs.rollouts import Settings, draw_id, planned
from jaxpersona.text import chat

ROLES = [Role("default", ("", "You are an AI."), ""), Role("ghost", ("Be a ghost.",), ""),
         Role("sage", ("Be a wise sage.",), "")]
QUESTIONS = [Question(i, f"Why {'so ' * i}?") for i in range(4)]
MODEL = dataclasses.replace(s.tiny_model(vocab_size=258), tokenizer=s.byte_tokenizer())
STATE = 3 * 32  # numbers of a residual state


def predict(folder, **options):
    return forecast(MODEL, ROLES, QUESTIONS, folder, **{
        "judge": NoJudge(), "settings": Settings(samples=2, max_new_tokens=600), "min_count": 1,
        "sample_seconds": 0, **options})


def test_tokens_and_bytes_are_those_of_the_texts(tmp_path):
    """Replies of up to 512 tokens, the context, with 4.5 bytes each; 32 rollouts are missing."""
    found = predict(tmp_path / "none")
    records = [one for role in ROLES for one in planned(role, QUESTIONS, Settings(samples=2))]
    sizes = [chat.encode_row(MODEL.tokenizer, one["conversation"]).tokens.size for one in records]
    assert (found.roles, found.prompts, found.questions, found.samples) == (2, 4, 4, 2)
    assert found.rollouts == found.missing == 32 == len(records) and found.judged == 16
    assert found.prompt_tokens == sum(sizes) and found.reply_tokens == 32 * 512
    text = sum(len(json.dumps(one, ensure_ascii=False)) for one in records) + 4.5 * 512 * 32
    role = 2 * 8 + 4 + 8 * 3 + 4 * 3  # eight means, a base, three sums and three vectors
    wanted = text + STATE * (4 + (2 * 16 + 4 + 8 + 4) + 2 * role)
    assert found.disk_bytes == round(wanted)
    assert found.live_bytes == 32 * 4 * STATE and found.free_bytes > 0
    assert found.seconds is found.pace is found.precision is None and not found.llm_judge
    few = predict(tmp_path / "none", keep_means=2)
    assert found.disk_bytes - few.disk_bytes == 2 * 2 * 6 * STATE
    target = predict(tmp_path / "none", precision=0.9)  # sums of 4 questions in 1, 3 and 3 groups
    assert target.disk_bytes - found.disk_bytes == 4 * 32 * (1 + 3 + 3) * 4
    assert target.precision == 0.9 and found.to_pay == 16
    short = predict(tmp_path / "none", settings=Settings(samples=2, max_new_tokens=7))
    assert short.reply_tokens == 32 * 7


def test_long_lists_of_prompts_are_sampled_evenly():
    """The indices are spread over the whole list."""
    assert module._spaced(10, 4) == [0, 2, 5, 7] and module._spaced(3, 3) == [0, 1, 2]
    assert module._spaced(0, 0) == []
    assert module._mean([]) == 0.0 and module._mean([1, 2, 6]) == 3.0


@pytest.mark.parametrize(("options", "wanted"), [
    ({"sample_seconds": float("nan")}, "sample_seconds is nan; it must be finite and at least 0"),
    ({"sample_seconds": float("inf")}, "sample_seconds is inf; it must be finite and at least 0"),
    ({"redo": ["x"]}, r"redo contains unknown roles \['x'\]"),
    ({"keep_means": 1}, "keep_means is 1"), ({"rounds": [4]}, "precision is None")])
def test_the_arguments_are_checked_as_for_a_run(tmp_path, options, wanted):
    """Nothing is written."""
    with pytest.raises(UserError, match=wanted):
        predict(tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


def test_a_forecast_supports_one_process(tmp_path, monkeypatch):
    """Several processes would generate the same sample."""
    monkeypatch.setattr(module.processes, "many", lambda: True)
    with pytest.raises(UserError, match="supports only one process; run it without --distributed"):
        predict(tmp_path / "none")


def test_a_timed_sample_has_the_settings_and_the_draws_of_the_run(tmp_path, monkeypatch):
    """All missing rollouts are queued; the totals follow from its mean lengths and its speed."""
    seen = []

    def measure(model, talks, **options):
        seen.append((talks, options))
        return Pace(np.array([2, 4]), np.array([], int), 0, np.array([10, 20]), 6.0, 1.0, 7, 4)

    monkeypatch.setattr(module, "measure", measure)
    settings = Settings(0.5, 0.8, 7, 2, 4, 11, True)
    found = predict(tmp_path / "none", settings=settings, sample_seconds=3)
    ((talks, options),) = seen
    records = [(role.name, one) for role in ROLES for one in planned(role, QUESTIONS, settings)]
    assert talks == [one["conversation"] for _, one in records]
    assert options.pop("ids") == [draw_id(MODEL, *one) for one in records]
    assert "capture" in options and options | {"capture": None} == {
        "seconds": 3, "temperature": 0.5, "top_p": 0.8, "max_new_tokens": 7, "batch_size": 4,
        "seed": 11, "capture": None}
    assert (found.prompt_tokens, found.reply_tokens, found.seconds) == (32 * 15, 32 * 3, 32 * 3.0)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_TIMED", 20)  # or four batches, if these are more
        predict(tmp_path / "none", settings=settings, sample_seconds=3)
    assert seen[1][0] == [talks[i * 32 // 20] for i in range(20)]
    assert predict(tmp_path / "none", sample_seconds=0).pace is None and len(seen) == 2


def test_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path):
    """The run folder may be missing."""
    assert module._existing(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "a").touch()  # a file
    assert module._existing(tmp_path / "a" / "b") == tmp_path and module._existing(
        tmp_path) == tmp_path


def made(**fields):
    pace = Pace(np.array([3, 5, 1000]), np.array([400]), 7, np.array([1]), 2.0, 9.4, 2000, 8)
    return Forecast(**{
        "roles": 1200, "prompts": 2401, "questions": 1000, "samples": 3, "rollouts": 12_000,
        "missing": 4_500, "prompt_tokens": 123_456, "reply_tokens": 2_000_000, "seconds": 3600.0,
        "pace": pace, "judged": 9000, "judge_calls": 1500, "llm_judge": True,
        "disk_bytes": 2_500_000_000, "live_bytes": 3_200_000, "free_bytes": 5_000_000_000,
        **fields})


def test_every_line_of_a_forecast_has_its_own_numbers():
    """Thousands are separated; the lengths of replies come from the timed sample."""
    found = made(precision=0.95)
    assert describe(found, judge="j", cost=0.002) == [
        "roles: 1,200 besides the default persona, system prompts: 2,401",
        "questions: 1,000, samples: 3",
        "precision 0.95: the following numbers are upper bounds, for a run of all questions; "
        "settled roles get fewer",
        "rollouts: 12,000, of which the folder contains 7,500; the following lines are for the "
        "other 4,500", "prompt tokens: about 123,456",
        f"reply tokens: about 2,000,000 ({found.pace.mean_length():,.0f} per reply)",
        "time of generation: about 1.0 hours (60 min) (replies in the sample: 3 finished, 1 "
        "unfinished; 704 tokens/s over 2.0 s, after 9 s of compilation)",
        "judging: the judge j scores 1,500 of the replies; the time above does not include judging",
        "cost of judging: 1,500 × $0.002 = $3.00",
        "disk: about 2.5 GB, plus 3.2 MB during the run; 5.0 GB free"]
    none = describe(made(pace=None, seconds=None), judge="j")
    assert none[2:6] == [
        "rollouts: 12,000, of which the folder contains 7,500; the following lines are for the "
        "other 4,500", "prompt tokens: about 123,456", "reply tokens: at most 2,000,000",
        "time: not measured"]
    assert not any("cost" in line for line in none)
    other = describe(made(llm_judge=False, judge_calls=0), judge="none", cost=0.5)
    assert other[-3:-1] == [
        "judging: no model is called (judge none); the time above does not include judging",
        "cost of judging all replies of the roles with another judge: 9,000 × $0.5 = $4,500.00"]
