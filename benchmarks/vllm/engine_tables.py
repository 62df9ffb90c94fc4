"""The tables of bench_engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.figures import spread
from benchmarks.results import TARGET_COLUMNS, Table, target_row
from benchmarks.timing import Summary, paired_ratio, percentile, tail_ratio
from benchmarks.vllm.engine import CONTROL, OURS, STOCK

SQUEEZED = "ours, squeezed"
THROUGHPUT_TARGET = 0.99
LATENCY_TARGET = 1.03
IDLE_TARGET = 0.030
BUSY_TARGET = 0.100

Answers = Mapping[str, Sequence[Mapping[str, Any]]]


def tables(
    loads: Mapping[str, Answers], idle: Sequence[Mapping[str, Any]], notes: Sequence[str]
) -> list[Table]:
    """What all loads show.

    Args:
        loads: for each load, what each contender saw, round by round.
        idle: memory taken from the idle engine.
        notes: what failed.
    """
    rows = [row for load, answers in loads.items() for row in _rows(load, answers)]
    columns = [
        "load, engine",
        "output",
        "over stock",
        "TTFT p50 / p99",
        "TPOT p50 / p99",
        "ITL p50 / p99",
        "tokens",
    ]
    note = (
        "output, ITL: medians of rounds. over stock: output tokens a second, median of the ratios round by "
        "round, with its quartiles. TTFT, TPOT: of the requests of all rounds. tokens: requests whose tokens "
        "are stock's in the same round; in bfloat16 they depend on which requests share a step."
    )
    found = [Table("One model", columns, rows, " ".join([note, *notes]))]
    by_load = {
        load: [each for seen in answers.get(SQUEEZED, []) for each in seen["squeezes"]]
        for load, answers in loads.items()
    }
    # Of an engine that has more than it can do at once no time was asked for.
    squeezes = [each for load, seen in by_load.items() if "/s" in load for each in seen]
    yields = [
        _yield_row(f"from the engine at {load}" if "/s" in load else f"with requests {load}", seen)
        for load, seen in by_load.items()
    ]
    if idle:
        yields.append(
            _yield_row(
                "from the idle engine",
                [{**each, "met": True, "yielded": each["held"] - each["left"]} for each in idle],
            )
        )
    found.append(
        Table(
            "Memory taken from the engine by a higher class",
            ["what", "demands met / refused", "yielded, median", "p50", "p99"],
            yields,
            "From the demand until its memory is mapped.",
        )
    )
    if any(CONTROL in answers for answers in loads.values()):
        found.append(_apart(loads))
    if any(each.get("kernel") for answers in loads.values() for seen in answers.values() for each in seen):
        found.append(_pace(loads))
    return [*found, _targets(loads, idle, squeezes)]


def _rows(load: str, answers: Answers) -> list[list[str]]:
    rows = []
    for name, seen in answers.items():
        if not seen:
            continue
        over = ""
        if name != STOCK and answers.get(STOCK):
            over = spread(
                paired_ratio(_each(seen, "output_per_second"), _each(answers[STOCK], "output_per_second"))
            )
        rows.append(
            [
                f"{load}, {name}",
                f"{_median(_each(seen, 'output_per_second')):,.0f} tokens/s",
                over,
                *(_pair(seen, what) for what in ("ttft", "tpot", "itl")),
                _same(seen, answers.get(STOCK, [])) if name != STOCK else "",
            ]
        )
    return rows


def _apart(loads: Mapping[str, Answers]) -> Table:
    """What each engine saw over what the first stock one did, the second stock one among them."""
    rows = []
    for load, answers in loads.items():
        stock = answers.get(STOCK, [])
        for name, seen in answers.items():
            if name == STOCK or not seen or not stock:
                continue
            output = paired_ratio(_each(seen, "output_per_second"), _each(stock, "output_per_second"))
            tails = (_tail(seen, stock, what) for what in ("ttft", "tpot", "itl"))
            rows.append([f"{load}, {name}", *(f"{each.median:.3f}" for each in (output, *tails))])
    columns = ["load, engine", "output", "TTFT p99", "TPOT p99", "ITL p99"]
    note = "Over the first stock engine. As far as the second is from it, the others may be by chance."
    return Table("Beside a second stock engine", columns, rows, note)


def _pace(loads: Mapping[str, Answers]) -> Table:
    """How fast the device takes one kernel of each engine's after the other, after its loads."""
    rows = []
    for load, answers in loads.items():
        for name, seen in answers.items():
            kernels = [each["kernel"] * 1e6 for each in seen if each.get("kernel")]
            if kernels:
                low, high = min(kernels), max(kernels)
                rows.append([f"{load}, {name}", f"{_median(kernels):.3f} us", f"{low:.3f} to {high:.3f} us"])
    note = (
        "A graph of 1,000 small kernels of the engine's process, after each load. Who is slower here is "
        "slower in every step, whatever the engine does."
    )
    return Table("From one kernel to the next", ["load, engine", "median", "rounds"], rows, note)


def _targets(
    loads: Mapping[str, Answers], idle: Sequence[Mapping[str, Any]], squeezes: Sequence[Mapping[str, Any]]
) -> Table:
    rows = []
    for load, answers in loads.items():
        stock, ours = answers.get(STOCK), answers.get(OURS)
        if not stock or not ours:
            continue
        ratio = paired_ratio(_each(ours, "output_per_second"), _each(stock, "output_per_second")).median
        rows.append(
            target_row(
                f"{load}: output over stock", f"{ratio:.3f}", "at least 0.99", ratio >= THROUGHPUT_TARGET
            )
        )
        for what in ("ttft", "tpot", "itl"):
            worst = _tail(ours, stock, what)
            rows.append(
                target_row(
                    f"{load}: {what.upper()} p99 over stock",
                    f"{worst.median:.3f} ({worst.q1:.2f} to {worst.q3:.2f})",
                    "at most 1.03",
                    worst.median <= LATENCY_TARGET,
                )
            )
    if idle:
        slow = _median([each["seconds"] for each in idle])
        rows.append(
            target_row(
                "from the idle engine, p50", f"{slow * 1e3:.1f} ms", "at most 30 ms", slow <= IDLE_TARGET
            )
        )
    if met := [each["seconds"] for each in squeezes if each["met"]]:
        slow = _median(met)
        rows.append(
            target_row("under load, p50", f"{slow * 1e3:.1f} ms", "at most 100 ms", slow <= BUSY_TARGET)
        )
    note = (
        "In brackets, of TTFT and TPOT: the quartiles of what as many other such requests would have given, "
        "by a bootstrap; of ITL: the quartiles of the rounds."
    )
    return Table("Targets", TARGET_COLUMNS, rows, note)


def _tail(ours: Sequence[Mapping[str, Any]], stock: Sequence[Mapping[str, Any]], what: str) -> Summary:
    """Our p99 over stock's. Of the times between tokens only each round's percentiles are kept."""
    if what == "itl":
        return paired_ratio([each[what][99] for each in ours], [each[what][99] for each in stock])
    return tail_ratio(_all(ours, what), _all(stock, what), 99)


def _yield_row(what: str, asked: Sequence[Mapping[str, Any]]) -> list[str]:
    taken = [each for each in asked if each["met"]]
    demands = f"{len(taken)} / {len(asked) - len(taken)}"
    if not taken:
        return [what, demands, "", "", ""]
    times = [each["seconds"] * 1e3 for each in taken]
    return [
        what,
        demands,
        f"{_median([each['yielded'] for each in taken]) / 2**30:.2f} GiB",
        f"{_median(times):.1f} ms",
        f"{percentile(times, 99):.1f} ms",
    ]


def _each(seen: Sequence[Mapping[str, Any]], what: str) -> list[float]:
    return [each[what] for each in seen]


def _median(values: Sequence[float]) -> float:
    return percentile(values, 50)


def _all(seen: Sequence[Mapping[str, Any]], what: str) -> list[float]:
    return [value for each in seen for value in each[what]]


def _pair(seen: Sequence[Mapping[str, Any]], what: str) -> str:
    if what == "itl":
        p50, p99 = (_median([each[what][at] for each in seen]) for at in (50, 99))
    else:
        p50, p99 = (percentile(_all(seen, what), at) for at in (50, 99))
    return f"{p50 * 1e3:.1f} / {p99 * 1e3:.1f} ms"


def _same(seen: Sequence[Mapping[str, Any]], stock: Sequence[Mapping[str, Any]]) -> str:
    pairs = [
        mine == theirs
        for one, other in zip(seen, stock, strict=False)
        for mine, theirs in zip(one["tokens"], other["tokens"], strict=True)
    ]
    return f"{sum(pairs)} of {len(pairs)}"
