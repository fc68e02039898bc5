"""Compare one continuous stream of rollouts with one call of `generate` per group of rollouts.

    python bench/stream.py --model mini --batch 32
    python bench/stream.py --model mini --batch 128

The rollouts are those of an axis run: role prompts and questions, with sampled replies and their
response means. A group contains at least 256 rollouts and at least four batches, except the last
group, which contains the remaining rollouts. `same_bits` reports whether both arms return identical
tokens and bit-identical means.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from typing import Any

from common import paired, report

import jaxpersona as jp
from jaxpersona.data import texts
from jaxpersona.engine.stream import Stream
from jaxpersona.organism import method
from jaxpersona.runs.rollouts import Settings, draw_id, generation, planned


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rollouts", type=int, default=1024)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=20, help="maximum number of pairs")
    parser.add_argument("--least", type=int, default=10)
    parser.add_argument("--budget", type=float, default=300.0, help="time limit in seconds")
    args = parser.parse_args()
    model = jp.load(args.model)
    own = args.model == "mini"
    roles = method.roles() if own else texts.load_roles(None)
    questions = method.questions() if own else texts.load_questions(None)
    settings = Settings(temperature=1.0, top_p=1.0, max_new_tokens=args.new, batch_size=args.batch)
    asked = [(record, record["conversation"], draw_id(model, role.name, record))
             for role in roles for record in planned(role, questions[:8], settings)]
    asked = [(i, talk, ident) for i, (_, talk, ident) in enumerate(asked[: args.rollouts])]
    options = generation(settings)
    size = 256 * max(1, -(-args.batch // 64))

    def one() -> dict[int, tuple[bytes, bytes]]:
        return {i: (reply.tokens.tobytes(), reply.captured["mean"].tobytes())
                for found in Stream(model, asked, **options) for i, reply in found}

    def groups() -> dict[int, tuple[bytes, bytes]]:
        held = {}
        for begin in range(0, len(asked), size):
            part = asked[begin : begin + size]
            out = jp.generate(model, [talk for _, talk, _ in part], ids=[i for *_, i in part],
                              **options)
            held |= {i: (out.tokens[k].tobytes(), out.captured["mean"][k].tobytes())
                     for k, (i, _, _) in enumerate(part)}
        return held

    first, second = one(), groups()
    same = first == second and len(first) == len(asked)
    tokens = sum(len(one) // 4 for one, _ in first.values())
    found = paired({"groups": lambda: clocked(groups), "stream": lambda: clocked(one)}, "groups",
                   pairs=args.pairs, least=args.least, budget=args.budget)
    report(
        "stream", model, args, rollouts=len(asked), group=size, tokens=tokens, same_bits=same,
        digest=hashlib.sha256(repr(sorted(first.items())).encode()).hexdigest()[:16],
        stream_over_groups=found["stream"]["ratio"], interval=found["stream"]["interval"],
        unresolved=found["stream"]["unresolved"], pairs=found["stream"]["pairs"],
        seconds_groups=found["groups"]["seconds"], seconds_stream=found["stream"]["seconds"],
    )


def clocked(work: Any) -> float:
    """Call `work` once and return the seconds."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
