"""Compare judging by digit probabilities with judging by greedy decoding of ten tokens.

    python bench/judging.py
    python bench/judging.py --judge FOLDER --replies 60

`mini` generates replies in its roles. Rules based on its grammar determine the correct scores of
these replies (`RuleJudge`). The judge, which is `mini` or another model, scores the replies in two
ways with the same prompts: by the probabilities of the digits 0 to 3 (`DigitJudge`), and by greedy
decoding of ten tokens (`SelfJudge`). The ratio is the seconds of `SelfJudge` divided by those of
`DigitJudge`, for complete calls in alternating pairs, without compilation. The agreement with the
rules is reported as Cohen's kappa with linear weights and its 95 % bootstrap confidence interval.
`mini` was not trained to judge, so its verdicts should agree with the rules no better than chance.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from common import paired, report

import jaxpersona as jp
from jaxpersona.judges.agreement import agreement
from jaxpersona.judges.digits import DigitJudge
from jaxpersona.judges.judges import SelfJudge
from jaxpersona.judges.protocol import Item, in_order
from jaxpersona.judges.rubric import Rubric
from jaxpersona.organism import method
from jaxpersona.runs.rollouts import Settings, opening

RUBRIC = Rubric(template=(
    "The role: {role} ({description}). The question: {question}\nThe answer: {answer}\n"
    "How fully does the answer play the role? 0: it refuses. 1: it declines the role but helps. 2: "
    "it shows some of the role. 3: it plays the role fully. Reply with one digit, 0, 1, 2 or 3."))


def replies(count: int, seed: int) -> list[Item]:
    """Return `count` replies of `mini` to random pairs of a role's prompt and a question."""
    model = jp.load("mini")
    roles = [role for role in method.roles() if role.name != "default"]
    questions = method.questions(max(1, -(-count // (5 * len(roles)))))
    asked = [(role, prompt, question.text) for role in roles for question in questions
             for prompt in role.prompts]
    chosen = [asked[i] for i in np.random.default_rng(seed).permutation(len(asked))[:count]]
    settings = Settings()
    out = jp.generate(model, [opening(prompt, text) for _, prompt, text in chosen],
                      max_new_tokens=64, temperature=settings.temperature, top_p=settings.top_p,
                      seed=seed)
    return [Item(str(i), role, text, answer)
            for i, ((role, _, text), answer) in enumerate(zip(chosen, out.text, strict=True))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--judge", default="mini")
    parser.add_argument("--replies", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--budget", type=float, default=150.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    items = replies(args.replies, args.seed)
    model = jp.load(args.judge)
    judges: dict[str, Any] = {
        "decoding": SelfJudge(model, batch_size=args.batch_size, rubric=RUBRIC),
        "digits": DigitJudge(model, rubric=RUBRIC)}

    def timer(judge: Any) -> Any:
        def once() -> float:
            begun = time.perf_counter()
            in_order(judge, items)
            return time.perf_counter() - begun

        return once

    timed = paired({name: timer(judge) for name, judge in judges.items()}, "decoding", least=5,
                   budget=args.budget)
    rules = {v.key: v.score for v in in_order(method.RuleJudge(), items)}
    agreed = {}
    for name, judge in judges.items():
        verdicts = in_order(judge, items)
        scores = {v.key: v.score for v in verdicts}
        found = agreement(rules, scores)
        agreed[name] = {"scored": sum(v is not None for v in scores.values()), "equal": found.equal,
                        "kappa": found.kappa, "interval": found.interval,
                        "table": found.table.tolist(), "labels": found.labels}
    report("judging", model, args, replies=len(items),
           tokens=float(np.mean([len(model.tokenizer(RUBRIC.prompt(i)).input_ids) for i in items])),
           arms=timed, rules=agreed)


if __name__ == "__main__":
    main()
