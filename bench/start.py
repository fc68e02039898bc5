"""Measure the time from the first import to the first token, and compare it with transformers.

    python bench/start.py --model FOLDER [--rounds 3] [--ahead qwen3-8b]

Every measurement runs in a new process. Three arms alternate, each of which imports the package,
loads the model and greedily answers one prompt at batch size 1: jaxpersona with empty compilation
caches (cold), jaxpersona with the caches of an earlier process (warm), and transformers
(`from_pretrained` and `generate`). The first token is timed at the first event of `Engine.stream`
or, in transformers, when the streamer receives the first generated token. Wall-clock seconds depend
on the load of the machine, so CPU seconds are also reported.

- `import_s`, `load_s`: the wall-clock seconds of the imports and of loading the model (median of
  the warm runs).
- `trace_s`, `compile_s`: the seconds of tracing (with lowering) and of compilation up to the first
  token of a cold run, from JAX's monitoring events. The times of concurrent threads are added.
- `run_s`: the seconds from the request to the first token when a process answers the same prompt
  a second time.
- `warm_ratio`, `cold_ratio`: the seconds to the first token divided by those of transformers
  (median over rounds).
- `second_s`: the seconds to the first token for the first prompt of another padded length, minus
  those for the same prompt when it is repeated, in a warm run.
- `programs`: the number of programs compiled for 20 prompts of different lengths (4 to 80 tokens)
  at batch sizes 1 and 8, with reply limits of 16 and 48 tokens.
- `ahead`: the seconds to trace, lower and compile prefill and decode of a large model ahead of time
  for a TPU v5e (if libtpu is installed) and an H100 (with XLA's description of an H200), with and
  without nested `jax.jit` functions (`models.blocks`).

The output is a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

PROMPT = "Why is the sky blue? Answer in two sentences."
LONGER = " ".join(["Here is a sentence of ten words to make it longer."] * 8)
NEW = 48


def ours(folder: str) -> dict[str, Any]:
    """Answer prompts with jaxpersona and return the seconds of each phase."""
    begun, spent = time.perf_counter(), time.process_time()
    import jaxpersona as jp

    imported = time.perf_counter()
    import jax.monitoring

    events: dict[str, float] = {}

    def heard(event: str, duration_secs: float, **_: Any) -> None:
        events[event] = events.get(event, 0.0) + duration_secs

    jax.monitoring.register_event_duration_secs_listener(heard)
    model = jp.load(folder)
    loaded = time.perf_counter()

    engine = jp.Engine(model, rows=1)

    def first(text: str) -> tuple[float, Any]:
        at = time.perf_counter()
        events = engine.stream(engine.submit(jp.Request(text, max_new_tokens=NEW)))
        next(events)
        return time.perf_counter() - at, events

    token, rest = first(PROMPT)
    cpu, heard_at_token = time.process_time() - spent, dict(events)
    text = list(rest)[-1].reply.text
    whole = time.perf_counter() - loaded
    again, longer, longer_again = (first(text)[0] for text in (PROMPT, LONGER, LONGER))
    from jaxpersona.engine.programs import TRACES

    def total(*names: str) -> float:
        return sum(s for name, s in heard_at_token.items() if any(n in name for n in names))

    return {"import_s": imported - begun, "load_s": loaded - imported, "token_s": token,
            "reply_s": whole, "cpu_s": cpu, "run_s": again, "text": text,
            "trace_s": total("trace_duration", "to_mlir_module_duration"),
            "compile_s": total("backend_compile_duration"), "traces": sum(TRACES.values()),
            "second_s": longer - longer_again, "events": heard_at_token}


def theirs(folder: str) -> dict[str, Any]:
    """Answer the prompt with transformers and return the seconds of each phase."""
    begun, spent = time.perf_counter(), time.process_time()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation.streamers import BaseStreamer

    imported = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                      trust_remote_code=False)
    loaded = time.perf_counter()

    class First(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[tuple[float, float]] = []

        def put(self, value: Any) -> None:
            self.times.append((time.perf_counter(), time.process_time()))

        def end(self) -> None:
            pass

    streamer = First()
    inputs = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}],
                                           add_generation_prompt=True, return_tensors="pt",
                                           return_dict=True)
    out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, streamer=streamer)
    done = time.perf_counter()
    text = tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    return {"import_s": imported - begun, "load_s": loaded - imported,
            "token_s": streamer.times[1][0] - loaded,  # the first call of `put` receives the prompt
            "reply_s": done - loaded, "cpu_s": streamer.times[1][1] - spent, "text": text}


def session(folder: str) -> dict[str, Any]:
    """Count the programs compiled for 20 prompts of different lengths at two batch sizes."""
    import jaxpersona as jp
    from jaxpersona.engine.compiled import KEPT
    from jaxpersona.engine.programs import TRACES

    model = jp.load(folder)
    ids = [[5 + i] * (4 + 4 * i) for i in range(20)]  # 4 to 80 tokens
    for rows in (1, 8):
        for new in (16, 48):
            jp.generate(model, ids, max_new_tokens=new, batch_size=rows)
    return {"programs": len(KEPT), "traces": dict(TRACES)}


def ahead(name: str) -> dict[str, Any]:
    """Compile programs of a large model for absent devices, with and without nested `jax.jit`."""
    import contextlib
    from unittest import mock

    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    import jaxpersona as jp
    from jaxpersona.engine.compiled import KEPT
    from jaxpersona.models import blocks
    from jaxpersona.models.params import layout
    from jaxpersona.planning import hlo, plan

    config, shapes = jp.preset(name), plan.Shapes.of(1, 512)
    out: dict[str, Any] = {}
    for target in ("v5e", "h100"):
        try:
            device = _device(target, topologies)
        except Exception as error:  # libtpu or the GPU compiler is not installed
            out[target] = f"not compiled ({type(error).__name__}: {str(error)[:80]})"
            continue
        placed = SingleDeviceSharding(device)
        params = jax.tree.map(
            lambda s, placed=placed: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16, sharding=placed),
            layout(config))
        for nested in (False, True):
            KEPT.clear()
            jax.clear_caches()
            backend = (mock.patch.object(jax, "default_backend", return_value="gpu")
                       if target == "h100" else contextlib.nullcontext())
            with mock.patch.object(blocks, "in_program", lambda nested=nested: nested), backend:
                begun, spent = time.perf_counter(), time.process_time()
                programs = plan.lowered(params, config, shapes, ())
                lowered, between = time.perf_counter() - begun, time.process_time() - spent
                prefill, decode = (program.compile() for program in programs)
                cpu = time.process_time() - spent
            cost = decode.cost_analysis() or {}
            out[f"{target} {'nested' if nested else 'flat'}"] = {
                "lower_s": lowered, "total_s": time.perf_counter() - begun,
                "lower_cpu_s": between, "total_cpu_s": cpu,
                "kernels": sum(op.kind in ("fusion", "custom-call", "copy", "sort")
                               for op in hlo.operations(decode.as_text() or "")),
                "bytes": cost.get("bytes accessed")}
            del prefill
    return out


def _device(target: str, topologies: Any) -> Any:
    """Return an abstract device to compile for; the device need not be present."""
    if target == "v5e":
        from jaxpersona.planning.chips import tpu_devices

        devices = tpu_devices("v5e:1x1")
        if devices is None:
            raise RuntimeError("libtpu is not installed")
        return devices[0]
    from ahead import H200  # the H200 is an H100 with more memory

    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    return topologies.get_topology_desc(platform="cuda", topology="1x1x1",
                                        target_config=H200).devices[0]


def process(task: str, argument: str, cache: str) -> dict[str, Any]:
    """Run a task in a new process; return its result and the seconds of the process."""
    begun = time.perf_counter()
    env = {**os.environ, "XDG_CACHE_HOME": cache, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__, "--one", task, argument], check=True, env=env,
                          stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    if "token_s" in found:
        found["first_s"] = found["import_s"] + found["load_s"] + found["token_s"]
    return {**found, "process_s": time.perf_counter() - begun}


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hugging Face model folder, or mini")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--session", default="mini", help="the model for `programs`")
    parser.add_argument("--ahead", default="", help="a preset to compile ahead of time")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    if "--one" in sys.argv:
        task, argument = sys.argv[sys.argv.index("--one") + 1:]
        print(json.dumps({"ours": ours, "theirs": theirs, "session": session,
                          "ahead": ahead}[task](argument)))
        return
    given = parser.parse_args()
    compare = pathlib.Path(given.model).is_dir()
    arms: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": [], "transformers": []}
    for turn in range(given.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for arm in ("cold", "warm"):
                arms[arm].append(process("ours", given.model, cache))
            if compare:
                arms["transformers"].append(process("theirs", given.model, cache))
        print(f"round {turn + 1}: " + ", ".join(
            f"{name} first token {runs[-1]['first_s']:.2f} s, reply {runs[-1]['reply_s']:.2f} s, "
            f"cpu {runs[-1]['cpu_s']:.2f} s" for name, runs in arms.items() if runs), flush=True)
    with tempfile.TemporaryDirectory() as cache:
        counted = process("session", given.session, cache)
    found = process("ahead", given.ahead, os.devnull) if given.ahead else None

    def middle(arm: str, key: str) -> float | None:
        values = [run[key] for run in arms[arm]]
        return round(statistics.median(values), 3) if values else None

    def ratio(arm: str, key: str = "first_s") -> float | None:
        pairs = list(zip(arms[arm], arms["transformers"], strict=False))
        return round(statistics.median(a[key] / b[key] for a, b in pairs), 3) if pairs else None

    from common import report

    phases = {arm: {key: middle(arm, key) for key in (
        "import_s", "load_s", "token_s", "first_s", "reply_s", "cpu_s")} for arm in arms}
    report("start", given.model, given, import_s=middle("warm", "import_s"),
           load_s=middle("warm", "load_s"), trace_s=middle("cold", "trace_s"),
           compile_s=middle("cold", "compile_s"), run_s=middle("warm", "run_s"),
           warm_ratio=ratio("warm"), cold_ratio=ratio("cold"),
           warm_cpu_ratio=ratio("warm", "cpu_s"),
           cold_cpu_ratio=ratio("cold", "cpu_s"), warm_traces=arms["warm"][-1]["traces"],
           second_s=middle("warm", "second_s"), programs=counted["programs"],
           same_reply=compare and arms["warm"][-1]["text"] == arms["transformers"][-1]["text"],
           phases=phases, ahead=found)


if __name__ == "__main__":
    main()
