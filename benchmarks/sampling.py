"""Solvers on trained networks, images/s, and metrics; writes benchmarks/results/sampling.{json,png}.

    python benchmarks/sampling.py [--json F] [--parts accuracy metrics speed] [--model runs/demo/model] [--golden DIR]

Prints one row per measurement, with its bar where it has one, and writes them to results/ and to F (a part that was not
run keeps the rows of the last run). accuracy: sampling_accuracy.py. metrics: metrics_rows.py.
speed: sampling_speed.py.
"""

import argparse
import json
from pathlib import Path

from metrics_rows import metrics_rows
from sampling_accuracy import accuracy_rows
from sampling_speed import MICRO_BATCHES, speed_rows
from timing import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"

PARTS = {
    "accuracy": lambda options: accuracy_rows(options.model, options.golden, RESULTS / "sampling.png"),
    "metrics": lambda options: metrics_rows(),
    "speed": lambda options: [row for batch in MICRO_BATCHES for row in speed_rows(batch)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="rows to make anew")
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "demo" / "model", help="written by `make demo`")
    parser.add_argument("--golden", type=Path, default=ROOT.parent / "shared" / "golden")
    options = parser.parse_args()
    kept = RESULTS / "sampling.json"
    rows = json.loads(kept.read_text()) if kept.exists() else []
    for part in options.parts:
        made = [{"part": part} | machine("cpu") | r for r in PARTS[part](options)]
        rows = [r for r in rows if r["part"] != part] + made
    rows.sort(key=lambda r: list(PARTS).index(r["part"]))
    text = json.dumps(rows, indent=1, default=lambda number: number.item()) + "\n"  # NumPy's numbers
    for path in (kept, options.json):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for r in rows:
        value = "-" if r["value"] is None else f"{r['value']:.4g}"
        bar = "" if r["bar"] is None else f"   bar {r['bar']:g}: {'holds' if r['holds'] else 'DOES NOT HOLD'}"
        note = f" ({r['note']})" if r.get("note") else ""
        print(f"{r['part']:<9}{r['name']:<78}{value:>11} {r['unit']}{bar}{note}")


if __name__ == "__main__":
    main()
