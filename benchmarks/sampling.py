"""Solvers on trained networks, images/s, and metrics; writes benchmarks/results/sampling.{json,png}.

    python benchmarks/sampling.py [--json F] [--parts accuracy metrics speed] [--model runs/demo/model] [--golden DIR]

Prints one row per measurement, with its bar where it has one, and writes them to results/ and to F (a part that was not
run keeps the rows of the last run). accuracy: sampling_accuracy.py. metrics: metrics_rows.py.
Speed: the default against an eager loop in the released manner, B/1 in fp32 with a B/1 guide, one thread, interleaved.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from metrics_rows import metrics_rows
from released_manner import guided_euler, matrix_products
from sampling_accuracy import accuracy_rows, row
from timing import interleave, machine, steady_memory
from torch import Tensor

from sfd_fast.config import GuidanceConfig, SamplerConfig
from sfd_fast.graphs import StepRunner
from sfd_fast.models.dit import LightningDiT
from sfd_fast.presets import PRESETS
from sfd_fast.sampler import guidance_table
from sfd_fast.solvers import make_plan, time_grid

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
SPEED_BATCH, SPEED_STEPS = 2, 1  # the ratio does not depend on the number of steps


def random_network(name: str) -> LightningDiT:
    model = LightningDiT(PRESETS[name]).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():  # zero-initialised layers: denormal or zero products would flatter no one
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def speed() -> list[dict]:
    """Images/s at the same number of guided evaluations: released manner, ours eager, ours compiled, and the cap."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steady_memory()
    main, guide = random_network("B"), random_network("B")
    config = main.config
    noise = torch.randn(SPEED_BATCH, config.channels, config.grid_size, config.grid_size)
    labels = torch.arange(SPEED_BATCH)
    settings = SamplerConfig(solver="euler", num_steps=SPEED_STEPS, grid="released")
    grid, plan = time_grid(settings, 0.3), make_plan(settings, 0.3)
    weights, needs_weak = guidance_table(plan, GuidanceConfig(mode="autoguidance", scale=1.5), 0.3)

    def ours(backend: str) -> Callable[[], Tensor]:
        runner = StepRunner(main, guide, micro_batch_size=SPEED_BATCH, plan=plan, backend=backend)
        runner.load(plan, weights, 0.3, exact=True)
        return lambda: runner.run(noise, labels, labels, needs_weak, grid.tolist())

    def released() -> Tensor:
        return guided_euler(main, guide, noise, labels, grid=grid.float(), delta_t=0.3, scale=1.5)

    def products() -> None:
        for _ in range(SPEED_STEPS):
            matrix_products(main, SPEED_BATCH)
            matrix_products(guide, SPEED_BATCH)

    candidates = {"released manner": released, "eager": ours("eager"), "compile": ours("compile"), "cap": products}
    torch.testing.assert_close(candidates["eager"](), released(), rtol=1e-3, atol=1e-3)
    timings, canary = interleave({k: [f] for k, f in candidates.items()}, seconds=60, min_rounds=5, max_rounds=9)
    median = {name: steps[0].median / 1e3 for name, (*steps,) in timings.items()}
    rows = [
        row(f"B/1 with guide, {name}", SPEED_BATCH / seconds, f"images/s at {SPEED_STEPS} evaluations")
        for name, seconds in median.items()
        if name != "cap"
    ]
    best = min(("eager", "compile"), key=median.__getitem__)
    ratio, cap = median["released manner"] / median[best], median["released manner"] / median["cap"]
    rows.append(row(f"B/1 with guide, fp32: ours ({best}) over the released manner", ratio, "ratio", 1.5, ratio >= 1.5))
    rows.append(row("  the most that is possible: matrix products and attention alone", cap, "ratio"))
    rows.append(row("  spread of the canary", canary.spread, "1"))
    return rows


PARTS = {
    "accuracy": lambda options: accuracy_rows(options.model, options.golden, RESULTS / "sampling.png"),
    "metrics": lambda options: metrics_rows(),
    "speed": lambda options: speed(),
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
