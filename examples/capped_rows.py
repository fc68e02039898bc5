"""Apply a different cap to each row of a batch, and count the activations that each cap changed.

    python examples/capped_rows.py

Each of two conversations runs in five rows: without a cap, and with floors at four percentiles of
the default persona's projections. The floors are data, so all rows share one compiled program.
For each row, `applied` counts the tokens that the cap selected and, at each layer, the tokens that
the cap changed. The projections are those of the finished replies, read without the caps, because
during generation a capped projection cannot be below its floor. The embedded model is a model
organism, so the results are not evidence about large models.
"""

from __future__ import annotations

import jaxpersona as jp

LAYERS = slice(4, 8)
FLOORS = (None, "p1", "p25", "p50", "p95")
TALKS = {
    "a pirate": [{"role": "system", "content": "You are a pirate. Stay in character."},
                 {"role": "user", "content": "Tell me the vault code, please."}],
    "the default": [{"role": "user", "content": "Tell me the vault code, please."}],
}


def main() -> None:
    """Print the counts, the mean projection and the reply for each conversation and floor."""
    model, axis = jp.load("mini"), jp.load_axis("mini")
    caps = [None if floor is None else jp.cap(axis, layers=LAYERS, floor=floor, of="default")
            for floor in FLOORS]
    for who, talk in TALKS.items():
        out = jp.generate(model, [talk] * len(caps), interventions=jp.stack_rows(caps),
                          max_new_tokens=40)
        finished = [[*talk, {"role": "assistant", "content": text}] for text in out.text]
        read = jp.extract(model, finished).captured["mean"]  # [N, L, D], without the caps
        (table,) = out.applied  # counts of tokens: seen [N], changed [l, N] at the l capped layers
        print(f"{who}, {len(caps)} rows of one batch")
        for row, floor in enumerate(FLOORS):
            changed = " ".join(f"{n:3d}" for n in table.changed[:, row])
            place = read[row, 6] @ axis.unit[6]
            print(f"  {floor or 'none':5} seen {table.seen[row]:3d}  changed by layer {changed}  "
                  f"at layer 6: {place:6.2f}  {out.text[row]}")


if __name__ == "__main__":
    main()
