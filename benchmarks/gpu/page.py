"""One page from the newest row of each measurement."""

import statistics
from collections.abc import Iterator
from pathlib import Path

from benchmarks import results
from benchmarks.gpu.jobs import Row
from dpfast.tables import columns

PARTS = ("tests", "kernels", "launches", "step")
DETAILED = ("conv.sq_norms", "conv.clipped_sum", "norm.group_norm_backward")
BEYOND = 1.01  # times the limit. Triton's interpreter cuts where a GPU rounds: its errors are at the limit of bfloat16
NOT = ("skipped", "failed", "left_out")


def page(folder: Path) -> str | None:
    """Nothing where there are no rows."""
    found = {part: newest(results.rows(f"gpu-{part}", folder)) for part in PARTS}
    if not any(found.values()):
        return None
    lines = [*machine([row for rows in found.values() for row in rows])]
    for part, make in (("tests", tests), ("kernels", kernels), ("launches", launches), ("step", steps)):
        if found[part]:
            good = [row for row in found[part] if not any(what in row for what in NOT)]
            lines += ["", f"== {part}", *make(good), *others(found[part])]
    return "\n".join(lines)


def newest(rows: list[Row]) -> list[Row]:
    """Of each name the last, in the order of first results; what was said of a run as a whole, of the last one."""
    last = {row["name"]: row for row in rows}
    return [
        row for row in last.values() if row["name"] not in (row["part"], "left out") or row["run"] == rows[-1]["run"]
    ]


def machine(rows: list[Row]) -> Iterator[str]:
    if any(row["dry"] for row in rows):
        yield "A DRY RUN: programs tried on the CPU, no figure means anything"
    last = rows[-1]
    gpu = last["machine"].get("gpu")
    if gpu is None:
        yield f"no GPU: {last['machine']['processor']}, {last['machine']['cores']} cores"
    else:
        memory = f"{gpu['memory'] / 2**30:.0f} GiB"
        yield f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['processors']} processors, {memory}"
        yield f"driver {gpu['driver']}, CUDA {gpu['cuda']}"
    yield ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    commits = sorted({row["commit"] for row in rows})
    yield f"commit {', '.join(commits)}" + (" (+: with changes)" if any("+" in commit for commit in commits) else "")
    devices = {row["machine"].get("gpu", {}).get("name") for row in rows}
    if len(devices) > 1:
        yield f"ROWS OF SEVERAL DEVICES: {', '.join(map(str, devices))}"


def others(rows: list[Row]) -> Iterator[str]:
    """What was not measured, and why: alike ones together."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for what in NOT[:2]:
            if what in row:
                reasons.setdefault(f"{what}: {row[what]}", []).append(row["name"])
    for reason, names in reasons.items():
        yield f"{reason} [{'; '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}]"
    for row in rows:
        if row.get("left_out"):
            yield f"left out for want of time: {len(row['left_out'])} rows, from {row['left_out'][0]!r} on"


def tests(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        yield f"{row['name']:22} {row['line']} ({row['took']:.0f} s)"


def kernels(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        if "flops" in row:
            yield f"ceilings: {row['line']}"
    timed = [row for row in rows if "op" in row]
    if not timed:
        return
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in timed:
        groups.setdefault((row["op"], row["dtype"], batch_of(row)), []).append(row)
    table = [("op", "dtype", "batch", "layers", "ms of all", "ordinary", "ratio", "of ceiling", "predicted", "call us")]
    table += [summary(key, of) for key, of in groups.items()]
    yield from columns(table, words=range(len(table[0])))
    yield "ms: of every layer of the model that has such a shape. predicted: over measured. call: of Python."
    for op in DETAILED:
        yield from detailed(op, [row for row in timed if row["op"] == op and row["dtype"] == main_dtype(op)])
    for row in timed:
        if is_beyond(row):
            yield f"{excess(row)}: {row['name']}"


def is_beyond(row: Row) -> bool:
    return not row["excess"] <= BEYOND


def excess(row: Row) -> str:
    return f"ERROR {row['error']:.2e}, {times(row['excess'])} times the limit"


def times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:,.0f}"


def main_dtype(op: str) -> str:
    return "float32" if op.startswith("norm") else "bfloat16"


def batch_of(row: Row) -> str:
    return row["shape"].rsplit(", ", 1)[1]


def summary(key: tuple[str, str, str], rows: list[Row]) -> tuple[str, ...]:
    ours = sum(row["count"] * row["seconds"]["dpfast"] for row in rows)
    theirs = sum(row["count"] * row["seconds"].get("ordinary", 0.0) for row in rows)
    known = [row for row in rows if row["predicted"]]
    predicted = sum(row["count"] * row["predicted"] for row in known)
    measured = sum(row["count"] * row["seconds"]["dpfast"] for row in known)
    shares = [row["rate"] / row["ceiling"] for row in rows]
    return (
        *key,
        str(sum(row["count"] for row in rows)),
        f"{1e3 * ours:.3f}",
        f"{1e3 * theirs:.3f}" if theirs else "",
        times(ours / theirs) if theirs else "",
        f"{100 * min(shares):.0f} to {100 * max(shares):.0f}%",
        f"{predicted / measured:.2f}" if known else "",
        f"{1e6 * statistics.median(row['calling'] for row in rows):.0f}",
    )


def detailed(op: str, rows: list[Row]) -> Iterator[str]:
    """A line for each layer, a column for each batch."""
    batches = list(dict.fromkeys(map(batch_of, rows)))
    layers = list(dict.fromkeys(row["shape"].rsplit(", ", 1)[0] for row in rows))
    if not rows:
        return
    yield ""
    yield (
        f"{op}, {rows[0]['dtype']}: TFLOP/s or TB/s, of the ceiling, time over that of the ordinary gradient; "
        "p: predicted over measured"
    )
    by_shape = {row["shape"]: cell(row) for row in rows}
    counts = {row["shape"].rsplit(", ", 1)[0]: row["count"] for row in rows}
    table = [("layer", "", *batches)]
    table += [
        (layer, f"x{counts[layer]}", *(by_shape.get(f"{layer}, {batch}", "") for batch in batches)) for layer in layers
    ]
    yield from columns(table, words=range(len(table[0])))


def cell(row: Row) -> str:
    ratio = f" {times(row['ratio'])}" if row["ratio"] else ""
    predicted = f" p{row['predicted'] / row['seconds']['dpfast']:.2f}" if row["predicted"] else ""
    unit = "TB/s" if row["unit"] == "B/s" else ""
    return f"{row['rate'] / 1e12:.3g}{unit} {100 * row['rate'] / row['ceiling']:.0f}%{ratio}{predicted}"


def launches(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        yield f"{row['name']}: {row['line']}"


def steps(rows: list[Row]) -> Iterator[str]:
    """Time and memory over those of the non-private step: a table for each model and number of rows."""
    tables: dict[str, list[Row]] = {}
    for row in rows:
        title = f"{row['model']} {row['dtype']}, {row['layout']}, {row['B'] * row['K']} rows"
        tables.setdefault(title, []).append(row)
    for title, found in tables.items():
        measured = {(row["contestant"], row["K"]): row for row in found if "time" in row}
        plans = {row["K"]: row for row in found if "planned_time" in row}
        ks = sorted({row["K"] for row in found})
        yield ""
        yield f"{title}: time, memory relative to the non-private step (compiled to compiled)"
        table = [("", *(f"K={k}" for k in ks))]
        for name in dict.fromkeys(name for name, _ in measured):
            of = [measured.get((name, k)) for k in ks]
            table.append((name, *(f"{row['time']:.3f}, {row['memory']:.3f}" if row else "" for row in of)))
        if plans:
            table.append(("plan of dpfast", *(planned(plans.get(k)) for k in ks)))
        yield from columns(table, words=range(len(table[0])))
        for row in found:
            if "shares" in row:
                yield f"{row['contestant']}, K={row['K']}: {row['line']}"
        for base in dict.fromkeys(row["base"] for row in measured.values()):
            of = [row for row in measured.values() if row["base"] == base]
            milliseconds = 1e3 * statistics.median(row["base_seconds"] for row in of)
            yield f"{base}: {milliseconds:.1f} ms, {of[0]['base_peak'] / 1e9:.2f} GB"


def planned(row: Row | None) -> str:
    return "" if row is None else f"{row['planned_time']:.3f}, {row['planned_peak'] / row['planned_base_peak']:.3f}"
