"""Steer with a custom direction, at eight strengths in one batch.

    python examples/steering_sweep.py

The direction is the difference of the mean activations of two groups of prompts: questions with a
system prompt that sets a role, and the same questions without a system prompt. The rows of the
batch add this direction with different strengths. The style of a reply is the share of its
sentences and dialect words that are in character, according to the grammar of the training corpus.
The embedded model is a model organism, so the results are not evidence about large models.
"""

from __future__ import annotations

import numpy as np

import jaxpersona as jp
from jaxpersona.organism import judge

ROLES = ("a pirate", "the void", "an oracle", "a jester")
TOPICS = ("the sea", "time", "friendship")
STRENGTHS = (-0.5, -0.25, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
LAYER = 4


def main() -> None:
    """Print one line for each strength: the mean style of the replies, and the first reply."""
    model = jp.load("mini")
    plain = [[{"role": "user", "content": f"Tell me about {topic}."}] for topic in TOPICS]
    played = [[{"role": "system", "content": f"You are {role}. Stay in character."}, *talk]
              for role in ROLES for talk in plain]
    vector = jp.contrast(model, played, plain, name="toward a role")  # [L, D]
    print(f"{vector}; norm at layer {LAYER}: {np.linalg.norm(vector.values[LAYER]):.1f}")

    # one row for each pair of strength and question; strength 0 leaves the row unchanged
    scales = np.repeat(STRENGTHS, len(plain))
    rows = jp.sweep(vector, scales, layers=LAYER, where=jp.everywhere.without("first"))
    out = jp.generate(model, plain * len(STRENGTHS), interventions=rows, max_new_tokens=40)
    for i, strength in enumerate(STRENGTHS):
        texts = out.text[i * len(plain) : (i + 1) * len(plain)]
        # the share of words in recognized sentences; 1 if no sentence is garbled
        known = np.mean([judge.recognised(text) for text in texts])
        style = np.mean([judge.style(text) for text in texts])
        style = 0.0 if np.isnan(style) else style
        print(f"{strength:+.2f}  style {style:.2f} {'█' * round(20 * style):20}  "
              f"readable {known:.2f}  {texts[0]}")


if __name__ == "__main__":
    main()
