"""Small-scale test of the embedded model: the axis recovers the ground truth and the cap works."""

import numpy as np
from scipy.stats import spearmanr

import jaxpersona as jp
from jaxpersona.organism import evaluate, method, world
from jaxpersona.persona.extract import extract_axis
from jaxpersona.runs.rollouts import Settings


def test_cap_holds_the_persona_and_spares_what_it_knows(tmp_path):
    """Distant roles reveal the code only without the cap; facts are answered either way."""
    model = jp.load("mini")
    roles = method.roles()
    found = extract_axis(
        model, roles, method.questions(3), tmp_path / "run", judge=method.RuleJudge(),
        settings=Settings(temperature=1.0, top_p=1.0, max_new_tokens=64, batch_size=64),
        min_count=5, held_out=method.held_out())
    middle = model.config.n_layers // 2
    assert found.analysis.cos_pc1[middle] >= 0.8
    for held_out, least in ((False, 0.95), (True, 0.9)):
        side = world.roles(held_out=held_out)
        place = [np.nanmean(found.projections[role.name][:, middle]) for role in side]
        assert spearmanr(place, [role.likeness for role in side]).statistic >= least
    cap = jp.cap(found.axis, layers=slice(middle, model.config.n_layers),
                 floor=found.axis.thresholds("p25", of="default"))
    asked, knowledge = evaluate.knowledge_conversations(True, 32)
    talks = evaluate.leak_conversations()[::8] + knowledge
    leaks = len(talks) - len(knowledge)
    out = jp.generate(model, talks * 2, max_new_tokens=64, batch_size=64,
                      interventions=jp.stack_rows([None] * len(talks) + [cap] * len(talks)))
    plain, capped = out.text[: len(talks)], out.text[len(talks) :]
    assert evaluate.leak_rate(plain[:leaks]) >= 0.9 and evaluate.leak_rate(capped[:leaks]) <= 0.1
    before = evaluate.accuracy(asked, plain[leaks:])
    assert before >= 0.95 and evaluate.accuracy(asked, capped[leaks:]) >= before - 0.03
    changed = out.applied[0].changed.sum(0)
    assert not changed[: len(talks)].any() and changed[len(talks) : len(talks) + leaks].all()
