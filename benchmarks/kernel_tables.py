"""Rows of the kernel benchmark as printed table, summary, plot, files and README."""

import csv
import json
import math
from pathlib import Path

LARGE_COPY_MS = 0.2
"""smaller cases are judged by host time alone"""


def whole_rows(rows: list[dict]) -> list[dict]:
    """The row of each large case that counts: forward + backward, or forward where there is no backward."""
    differentiable = {(row["operator"], row["dtype"], row["shape"]) for row in rows if row["pass"] == "both"}
    return [
        row
        for row in rows
        if row["copy_ms"] >= LARGE_COPY_MS
        and (row["pass"] == "both" or (row["operator"], row["dtype"], row["shape"]) not in differentiable)
    ]


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")


def print_rows(rows: list[dict]) -> None:
    print(f"{'operator':30} {'pass':8} {'dtype':5} {'shape':9} {'eager':>9} {'compile':>9} {'ours':>9}", end="")
    print(f" {'copy':>8} {'x comp.':>7} {'x eager':>7} {'of copy':>7} {'host us':>8} {'spread':>6}")
    for row in rows:
        print(
            f"{row['operator']:30} {row['pass']:8} {row['dtype']:5} {row['shape']:9} {row['reference_ms']:9.3f} "
            f"{row['compile_ms']:9.3f} {row['ours_ms']:9.3f} {row['copy_ms']:8.3f} {row['faster_than_compile']:7.2f} "
            f"{row['faster_than_reference']:7.2f} {row['share_of_copy']:7.0%} {row['host_us']:8.1f} "
            f"{row['ours_spread']:6.0%}"
        )
        for other, value in row["others_ms"].items():
            print(f"{'':30} {other}: {value:.3f} ms, ours is {value / row['ours_ms']:.2f}x as fast")


def print_summary(rows: list[dict]) -> None:
    """Means over the large cases, and every case that loses to torch.compile or does not win beyond noise."""
    for mode in dict.fromkeys(row["dtype"] for row in rows):
        large = [row for row in whole_rows(rows) if row["dtype"] == mode]
        if large:
            over_compile = geometric_mean([row["faster_than_compile"] for row in large])
            over_eager = geometric_mean([row["faster_than_reference"] for row in large])
            print(
                f"{mode}: {len(large)} cases whose copy takes {LARGE_COPY_MS} ms or more, forward + backward: "
                f"{over_compile:.2f}x torch.compile, {over_eager:.2f}x eager (geometric means)"
            )
    losing = [row for row in whole_rows(rows) if not row["beyond_noise"]]
    for row in losing:
        print(
            f"not faster than torch.compile beyond noise: {row['operator']} {row['dtype']} {row['shape']}: "
            f"{row['ours_ms']:.3f} against {row['compile_ms']:.3f} ms"
        )
    if not losing:
        print("every large case is faster than torch.compile beyond noise (upper quartile below its lower one)")
    for row in rows:
        if row["faster_than_compile"] < 1 and row not in losing:
            why = "backward alone; with its forward it wins" if row["pass"] == "backward" else "a small case"
            print(
                f"slower than torch.compile ({why}): {row['operator']} {row['pass']} {row['dtype']} {row['shape']}: "
                f"{row['ours_ms']:.3f} against {row['compile_ms']:.3f} ms"
            )
    if rows:
        print(f"canary spread, worst case: {max(row['canary_spread'] for row in rows):.0%}")


def write_plot(rows: list[dict], path: Path) -> None:
    """Speed over eager and over torch.compile of every large case, forward + backward."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    large = whole_rows(rows)
    if not large:
        return
    labels = [f"{row['operator']}\n{row['dtype']}, {row['shape']}" for row in large]
    figure, axis = pyplot.subplots(figsize=(9, 0.55 * len(large) + 1.5))
    positions = range(len(large))
    for offset, key, name in ((-0.2, "faster_than_reference", "eager"), (0.2, "faster_than_compile", "torch.compile")):
        values = [row[key] for row in large]
        bars = axis.barh([p + offset for p in positions], values, height=0.38, label=f"over {name}")
        axis.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(list(positions), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("times as fast, forward + backward")
    axis.set_title(large[0]["device"], fontsize=9)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_results(rows: list[dict], folder: Path, name: str) -> None:
    """NAME.json, NAME.csv, NAME.png in folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({**row, "others_ms": json.dumps(row["others_ms"])} for row in rows)
    write_plot(rows, folder / f"{name}.png")


def markdown(rows: list[dict]) -> str:
    """A table of forward and whole times, and the geometric means of each dtype mode, for README.md."""
    lines = [
        "| operator | pass | dtype, shape | eager ms | compile ms | ours ms "
        "| over compile | over eager | of copy | host us |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        if row["pass"] != "backward":
            name = {"forward": "forward", "both": "forward + backward"}[row["pass"]]
            lines.append(
                f"| {row['operator']} | {name} | {row['dtype']}, {row['shape']} | {row['reference_ms']:.2f} "
                f"| {row['compile_ms']:.2f} | {row['ours_ms']:.2f} | {row['faster_than_compile']:.1f}x "
                f"| {row['faster_than_reference']:.1f}x | {row['share_of_copy']:.0%} | {row['host_us']:.0f} |"
            )
    for row in rows:
        ours, timed = row["ours_ms"], row["others_ms"].items()
        others = [f"{name} {value:.1f} ms ({value / ours:.1f}x ours)" for name, value in timed]
        if others:
            lines += ["", f"{row['operator']}, {row['dtype']}, {row['shape']}, beside: {'; '.join(others)}."]
    lines += ["", f"Geometric means over cases whose copy takes {LARGE_COPY_MS} ms or more, forward + backward:"]
    for mode in dict.fromkeys(row["dtype"] for row in rows):
        large = [row for row in whole_rows(rows) if row["dtype"] == mode]
        over_compile = geometric_mean([row["faster_than_compile"] for row in large])
        over_eager = geometric_mean([row["faster_than_reference"] for row in large])
        lines.append(f"{mode} {over_compile:.1f}x torch.compile and {over_eager:.1f}x eager ({len(large)} cases);")
    lines[-1] = lines[-1].removesuffix(";") + f". {rows[0]['device']}, torch {rows[0]['torch']}."
    return "\n".join(lines)
