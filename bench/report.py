"""Write `bench/REPORT.md` and its plots from the results in `bench/results`.

    python bench/report.py

Ratios whose interval is too wide are marked as unresolved.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from jaxpersona.report import benches
from jaxpersona.report.style import new_figure, save, style

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
BENCHES = ("cap_overhead", "rows", "decode", "extract", "pipeline", "peers", "roofline")


def main() -> None:
    """Read the results, draw the plots, write the report and print its path."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    found = {name: value for name, value in found.items()
             if isinstance(value, dict) and value.get("bench") in BENCHES}
    plots = draw(found)
    lines = ["# Measurements", "",
             "Written by `bench/report.py` from `bench/results/`; `make bench` repeats the CPU "
             "measurements. A ratio is the median of alternating pairs with its bootstrap 95 % "
             "interval. An interval wider than 0.02, or than 2 % of a ratio above 1, is "
             "*unresolved* and supports no claim. `NOTES.md` compares the expected and the "
             "measured effect of each change.",
             ""]
    for plot, caption in plots:
        lines += [f"![{caption}](results/{plot})", ""]
    for bench in BENCHES:
        results = {name: value for name, value in found.items() if value["bench"] == bench}
        if not results:
            continue
        lines += [f"## {bench}", "", "| run | figure | value |", "|---|---|---|"]
        for name, value in results.items():
            lines += [f"| {name}: {describe(value)} | {key} | {shown} |"
                      for key, shown in figures(value)]
        lines.append("")
    (HERE / "REPORT.md").write_text("\n".join(lines))
    print(HERE / "REPORT.md")


def describe(value: dict[str, Any]) -> str:
    """Return a description of a run: its model, arguments, device and date."""
    keep = ("batch", "steps", "distinct", "layers", "temperature", "top_p", "dtype", "new",
            "conversations", "prompts", "budget")
    usual = {"temperature": 0.0, "top_p": 1.0}
    given = [f"{key} {arg}" for key in keep
             if (arg := value["arguments"].get(key)) not in (None, []) and arg != usual.get(key)]
    return ", ".join([value["model"], *given, value["device"], value["date"]])


def figures(value: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value as text) for each quantity in a result, with the intervals of ratios."""

    def ratio(number: Any, interval: Any, unresolved: Any) -> str:
        mark = " *unresolved*" if unresolved else ""
        return f"{number} [{interval[0]}, {interval[1]}]{mark}"

    match value["bench"]:
        case "cap_overhead":
            return [
                ("capped ÷ uncapped", ratio(value["capped_over_uncapped"], value["interval"],
                                            value["unresolved"])),
                ("idle ÷ uncapped", ratio(value["idle_over_uncapped"], value["idle_interval"],
                                          value["idle_unresolved"])),
                ("added fusions per capped layer; per step", f"{value['added_fusions_per_layer']};"
                 f" {value['added_fusions_once']} (of {value['fusions_uncapped']})"),
                ("ms per step", str(value["ms_per_step"])),
            ] + [(f"{n} layers capped ÷ uncapped", ratio(at["ratio"], at["interval"],
                                                          at["unresolved"]))
                 for n, at in value["by_layers"].items() if len(value["by_layers"]) > 1]
        case "rows":
            return [("distinct ÷ shared", ratio(value["distinct_over_shared"], value["interval"],
                                                value["unresolved"]))]
        case "decode":
            return [(f"batch {rows}", f"{at['tokens_per_second']} tokens/s, {at['ms_per_step']} ms "
                     f"per step, MBU {at['mbu']}; captured ÷ plain "
                     + ratio(at["captured_over_plain"], at["captured_interval"],
                             at["captured_unresolved"]))
                    for rows, at in value["by_batch"].items()]
        case "extract":
            keys = ("tokens_per_second", "mfu", "padding_efficiency", "capture_over_plain",
                    "ratio_to_hooks", "ratio_to_sorted_hooks",
                    "ratio_to_sorted_hooks_without_head", "worst_distance",
                    "peak_memory_ratio_to_hooks")
            return [(key, str(value[key])) for key in keys]
        case "pipeline":
            return [
                ("one pass ÷ two passes", ratio(value["one_pass_over_two_pass"], value["interval"],
                                            value["unresolved"])),
                ("predicted", str(value["predicted"])),
                ("one pass ÷ two engines", str(value["one_pass_over_two_engines"])),
                ("refill ÷ static", ratio(value["refill_over_static"], value["refill_interval"],
                                             value["refill_unresolved"])),
            ]
        case "peers":
            return [(f"batch {rows}", ratio(at["ratio"], at["interval"], at["unresolved"])
                     + f": {at['ours']} {at['tokens_per_second']['ours']}, {at['peer']} "
                     f"{at['tokens_per_second']['hooks']} tokens/s"
                     + "".join(f"; over {form} {times} ×"
                               for form, times in at["ratio_to_forms"].items()))
                    for rows, at in value["by_batch"].items()]
        case _:
            roof = value["roof"]
            head = [("roof", f"{roof['bytes_per_second'] / 1e9:.1f} GB/s, "
                     f"{roof['flops_per_second'] / 1e9:.0f} GFLOP/s")]
            return head + [(p["name"], f"{p['flops_per_second'] / 1e9:.1f} GFLOP/s, "
                            f"{p['of_roof']} of the roof") for p in value["points"]]


def draw(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Draw the four plots in one image and return a list with its (file name, caption)."""
    figure = new_figure(10.5, 8)
    kinds = {kind: {name: value for name, value in found.items() if value["bench"] == kind
                    and (kind != "cap_overhead" or len(value["by_layers"]) > 1)}
             for kind in ("decode", "cap_overhead", "rows", "roofline")}
    with style():
        for axes, results in zip(figure.subplots(2, 2).flat, kinds.values(), strict=True):
            if results:
                benches.bench(results, ax=axes)
            else:
                axes.set_axis_off()
    save(figure, RESULTS / "speed.png")
    return [("speed.png", "throughput by batch size, overhead by capped layers and by distinct "
             "settings, and the roofline")]


if __name__ == "__main__":
    main()
