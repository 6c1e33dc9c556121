"""Solvers on trained networks (error over evaluations) and images/s; writes benchmarks/results/sampling.{json,png}.

    python benchmarks/sampling.py [--model runs/demo/model] [--golden FOLDER] [--json F] [--part all|accuracy|speed]

Error: root mean square difference of the final latents to the exact solution (dopri5 at tolerance 1e-9 in float64).
Speed: the default against an eager loop in the released manner, B/1 in fp32 with a B/1 guide, one thread, interleaved.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from released_manner import guided_euler, matrix_products
from timing import interleave, machine, steady_memory
from torch import Tensor

from sfd_fast.checkpoint import load_released
from sfd_fast.config import GuidanceConfig, SamplerConfig
from sfd_fast.graphs import StepRunner
from sfd_fast.guidance import Velocity, autoguidance, bind_labels
from sfd_fast.models.dit import LightningDiT
from sfd_fast.pictures import figure
from sfd_fast.pipeline import SFDPipeline
from sfd_fast.presets import PRESETS
from sfd_fast.sampler import guidance_table, sample
from sfd_fast.solvers import make_plan, time_grid

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
STEPS = (3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 28, 32, 40, 48, 64, 96, 128)
PER_STEP = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 1, "abm3": 1, "rk4": 4}
EULER_250 = SamplerConfig(solver="euler", num_steps=249, grid="released")
MOST_EVALUATIONS = 128
SPEED_BATCH, SPEED_STEPS = 2, 1  # the ratio does not depend on the number of steps


@dataclass(frozen=True)
class Problem:
    """A velocity field with its noise and exact solution."""

    name: str
    velocity: Velocity
    noise: Tensor
    exact: Tensor
    delta_t: float
    texture: int

    def error(self, config: SamplerConfig) -> float:
        out = sample(self.velocity, self.noise, delta_t=self.delta_t, config=config, num_texture_channels=self.texture)
        return (out.double() - self.exact).square().mean().sqrt().item()


def problem(
    name: str, networks: list[LightningDiT], noise: Tensor, labels: Tensor, guidance: GuidanceConfig, delta_t: float
) -> Problem:
    """networks: the model, and its guide where guidance is active."""
    texture = networks[0].config.texture_channels

    def velocity(*models: LightningDiT) -> Velocity:
        fields = [bind_labels(model, labels) for model in models]
        if len(fields) == 1:
            return fields[0]
        return autoguidance(*fields, guidance, num_texture_channels=texture, delta_t=delta_t)

    tight = SamplerConfig(solver="dopri5", atol=1e-9, rtol=1e-9)
    doubles = velocity(*(model.double() for model in networks))
    exact = sample(doubles, noise.double(), delta_t=delta_t, config=tight, num_texture_channels=texture)
    return Problem(name, velocity(*(model.float() for model in networks)), noise, exact, delta_t, texture)


def demo_problem(folder: Path, batch: int = 32) -> Problem:
    pipeline = SFDPipeline.from_pretrained(folder, device="cpu")
    guidance = pipeline.guidance
    if pipeline.guide is not None and not guidance.active:
        guidance = GuidanceConfig(mode="autoguidance", scale=1.5)
    networks = [pipeline.model] + ([pipeline.guide] if pipeline.guide is not None else [])
    noise = pipeline.initial_noise(torch.arange(batch), 0)
    labels = torch.arange(batch) % pipeline.config.num_classes
    return problem("demo", networks, noise, labels, guidance, pipeline.delta_t)


def golden_problem(folder: Path, name: str) -> Problem:
    from safetensors.torch import load_file

    config = json.loads((folder / f"{name}.config.json").read_text())
    tensors = load_file(folder / f"{name}.golden.safetensors")
    model = load_released(folder / f"{name}.weights.safetensors", config)
    return problem(
        f"golden {name}", [model], tensors["sample.z"], tensors["y"], GuidanceConfig(), config["semfirst_delta_t"]
    )


def row(name: str, value: float, unit: str, bar: float | None = None, holds: bool | None = None) -> dict:
    return {"name": name, "value": value, "unit": unit, "bar": bar, "holds": holds}


def curve(case: Problem, solver: str) -> list[tuple[int, float]]:
    """(evaluations, error) of a solver over numbers of steps."""
    per_step = PER_STEP[solver]
    steps = [n for n in STEPS if n * per_step <= MOST_EVALUATIONS]
    return [(n * per_step, case.error(SamplerConfig(solver=solver, num_steps=n))) for n in steps]


def fewest_evaluations(case: Problem, solver: str, points: list[tuple[int, float]], wanted: float) -> int | None:
    """Evaluations from which on a solver's error stays at or below the wanted one; exact to one step."""
    per_step = PER_STEP[solver]
    above = [evaluations for evaluations, error in points if error > wanted]
    below = [evaluations for evaluations, _ in points if not above or evaluations > above[-1]]
    if not below:
        return None
    least, start = below[0], max([STEPS[0] * per_step - per_step, *above])
    while least - per_step > start:
        if case.error(SamplerConfig(solver=solver, num_steps=least // per_step - 1)) > wanted:
            break
        least -= per_step
    return least


def accuracy(case: Problem, barred: bool) -> tuple[list[dict], dict[str, list[tuple[int, float]]], float]:
    """Rows, curves per solver, and the error of the released Euler with 250 points."""
    euler = case.error(EULER_250)
    default = SamplerConfig()
    rows = [row(f"{case.name}: error of the released Euler with 250 points", euler, "rms")]
    curves = {solver: curve(case, solver) for solver in PER_STEP}
    for solver, points in curves.items():
        least = fewest_evaluations(case, solver, points, euler)
        if least is None:
            rows.append(row(f"{case.name}: {solver} needs more than", MOST_EVALUATIONS, "evaluations for that error"))
            continue
        rows.append(row(f"{case.name}: {solver} for that error", least, "evaluations"))
        if solver == default.solver:
            bar = 0.25 if barred else None
            share = least / EULER_250.num_steps
            rows.append(
                row(f"{case.name}: the same as a share of 249", share, "ratio", bar, share <= bar if barred else None)
            )
    ratio = case.error(default) / euler
    name = f"{case.name}: error of the default ({default.solver}, {default.num_steps} steps) over that of Euler"
    rows.append(row(name, ratio, "ratio", 1.0 if barred else None, ratio <= 1 if barred else None))
    return rows, curves, euler


def adaptive(case: Problem) -> list[dict]:
    """What dopri5 per sample costs at its default tolerances."""
    calls = []

    def counted(x: Tensor, t_tex: Tensor, t_sem: Tensor) -> Tensor:
        calls.append(1)
        return case.velocity(x, t_tex, t_sem)

    error = replace(case, velocity=counted).error(SamplerConfig(solver="dopri5"))
    return [
        row(f"{case.name}: dopri5 per sample (rtol 1e-3)", len(calls), "evaluations"),
        row(f"{case.name}: its error", error, "rms"),
    ]


def plot(results: list[tuple[Problem, dict[str, list[tuple[int, float]]], float]], path: Path) -> None:
    drawn = figure(5.2 * len(results), 4.0)
    axes = drawn.subplots(1, len(results), squeeze=False)[0]
    for axis, (case, curves, euler) in zip(axes, results):
        for solver, points in curves.items():
            axis.loglog(*zip(*points), "o-", ms=3, lw=2 if solver == SamplerConfig().solver else 1, label=solver)
        axis.axhline(euler, color="k", ls=":", label="released Euler, 250 points")
        axis.set_title(case.name)
        axis.set_xlabel("network evaluations")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("rms error of the final latents")
    axes[0].legend(fontsize=8)
    drawn.savefig(path, dpi=110)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "demo" / "model")
    parser.add_argument("--golden", type=Path, default=ROOT.parent / "shared" / "golden")
    parser.add_argument("--json", type=Path, default=RESULTS / "sampling.json")
    parser.add_argument("--plot", type=Path, default=RESULTS / "sampling.png")
    parser.add_argument("--part", choices=("all", "accuracy", "speed"), default="all", help="rows to make anew")
    options = parser.parse_args()
    rows = json.loads(options.json.read_text()) if options.json.exists() and options.part != "all" else []
    for part, make in (("accuracy", accuracy_rows), ("speed", lambda options: speed())):
        if options.part in ("all", part):
            rows = [r for r in rows if r["part"] != part]
            rows += [r | {"part": part} | machine("cpu") for r in make(options)]
    for r in rows:
        shown = "" if r["bar"] is None else f"   bar {r['bar']}: {'holds' if r['holds'] else 'DOES NOT HOLD'}"
        print(f"{r['name']:<78}{r['value']:>11.4g} {r['unit']}{shown}")
    print(machine("cpu"))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(rows, indent=1) + "\n")


def accuracy_rows(options: argparse.Namespace) -> list[dict]:
    """Rows of all networks at hand, and their plot."""
    cases = []
    if options.model.is_dir():
        cases.append((demo_problem(options.model), True))
    else:
        print(f"no trained model in {options.model}: run `sfd demo` first, or give --model; its bars are left out")
    if options.golden.is_dir():
        cases += [(golden_problem(options.golden, name), False) for name in ("sfd", "sync")]
    rows, drawn = [], []
    for case, barred in cases:
        found, curves, euler = accuracy(case, barred)
        rows += found + adaptive(case)
        drawn.append((case, curves, euler))
    if drawn:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(drawn, options.plot)
    if options.model.is_dir():
        pipeline = SFDPipeline.from_pretrained(options.model, device="cpu")
        labels = torch.arange(64) % pipeline.config.num_classes
        difference = pipeline.micro_batch_difference(labels, sizes=(1, 32))
        rows.append(row("demo: values that differ between micro-batches of 1 and 32", difference["share"], "share"))
        largest = difference["largest"]
        rows.append(row("demo: largest such difference", largest, "levels of 255", 1, largest <= 1))
    return rows


if __name__ == "__main__":
    main()
