"""Error of every solver over network evaluations on trained networks, against the exact solution.

Error: root mean square difference of the final latents to the exact solution (dopri5 at tolerance 1e-9 in float64).
Evaluations: calls of the main network for the whole batch; dopri5 chooses its steps for each sample, and the batch
waits for the last.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sfd_fast.config import GuidanceConfig, SamplerConfig
from sfd_fast.formats.released_model import load_released
from sfd_fast.models.dit import LightningDiT
from sfd_fast.pictures import figure
from sfd_fast.sampling.guidance import Guided, Velocity, autoguidance, bind_labels
from sfd_fast.sampling.pipeline import SFDPipeline
from sfd_fast.sampling.sampler import sample

STEPS = (3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 28, 32, 40, 48, 64, 96, 128)
PER_STEP = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 1, "abm3": 1, "rk4": 4}
EULER_250 = SamplerConfig(solver="euler", num_inference_steps=249, grid="released")
MOST_EVALUATIONS = 128
RTOLS = (0.3, 0.1, 0.05, 0.02, 0.01, 3e-3, 1e-3, 3e-4)  # of dopri5, whose atol is a thousandth of it as in the defaults
Points = list[tuple[int, float]]
"""(evaluations, error) of one solver"""
SHARE = "the default's evaluations for that error over those of Euler-250"
FEWEST = "the default's evaluations for that error over those of the next best solver"
DEFAULT = SamplerConfig()
RATIO = f"error of the default ({DEFAULT.solver}, {DEFAULT.num_inference_steps} evaluations) over Euler-250's"
LARGEST = "largest difference between micro-batches of 1 and 32"
TICKS = (4, 8, 16, 32, 64, 128, 256)


def row(name: str, value: float | None, unit: str, bar: float | None = None, holds: bool | None = None) -> dict:
    return {"name": name, "value": value, "unit": unit, "bar": bar, "holds": holds}


def checked(name: str, value: float | None, bar: float, barred: bool, unit: str = "ratio") -> dict:
    """A row that holds where its value is at most the bar; one that could not be measured does not."""
    if not barred:
        return row(name, value, unit)
    return row(name, value, unit, bar, value is not None and value <= bar)


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

    def counted(self, config: SamplerConfig) -> tuple[int, float]:
        """(evaluations of the main network, error)."""
        calls = []

        def counting(field: Velocity) -> Velocity:
            def called(x: Tensor, t_tex: Tensor, t_sem: Tensor) -> Tensor:
                calls.append(1)
                return field(x, t_tex, t_sem)

            return called

        guided = isinstance(self.velocity, Guided)
        velocity = replace(self.velocity, main=counting(self.velocity.main)) if guided else counting(self.velocity)
        error = replace(self, velocity=velocity).error(config)
        return len(calls), error


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
    networks = [pipeline.transformer] + ([pipeline.guide] if pipeline.guide is not None else [])
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


def curve(case: Problem, solver: str) -> Points:
    """A fixed-step solver over numbers of steps."""
    per_step = PER_STEP[solver]
    steps = [n for n in STEPS if n * per_step <= MOST_EVALUATIONS]
    return [(n * per_step, case.error(SamplerConfig(solver=solver, num_inference_steps=n))) for n in steps]


def adaptive_curve(case: Problem) -> Points:
    """dopri5 over tolerances."""
    return [case.counted(SamplerConfig(solver="dopri5", rtol=rtol, atol=rtol * 1e-3)) for rtol in RTOLS]


def fewest_evaluations(case: Problem, solver: str, points: Points, wanted: float) -> int | None:
    """Evaluations from which on a solver's error stays at or below the wanted one; exact to one step."""
    per_step = PER_STEP[solver]
    above = [evaluations for evaluations, error in points if error > wanted]
    below = [evaluations for evaluations, _ in points if not above or evaluations > above[-1]]
    if not below:
        return None
    least, start = below[0], max([STEPS[0] * per_step - per_step, *above])
    while least - per_step > start:
        if case.error(SamplerConfig(solver=solver, num_inference_steps=least // per_step - 1)) > wanted:
            break
        least -= per_step
    return least


def accuracy(case: Problem, barred: bool) -> tuple[list[dict], dict[str, Points], float]:
    """Rows, curves per solver, and the error of the released Euler with 250 points."""
    wanted = case.error(EULER_250)
    default = SamplerConfig()
    rows = [row(f"{case.name}: error of the released Euler with 250 points", wanted, "rms")]
    curves = {solver: curve(case, solver) for solver in PER_STEP} | {"dopri5": adaptive_curve(case)}
    least = {solver: fewest_evaluations(case, solver, curves[solver], wanted) for solver in PER_STEP}
    least["dopri5"] = min((evaluations for evaluations, error in curves["dopri5"] if error <= wanted), default=None)
    for solver, evaluations in least.items():
        if evaluations is None:
            rows.append(row(f"{case.name}: {solver} needs more than", MOST_EVALUATIONS, "evaluations for that error"))
        else:
            rows.append(row(f"{case.name}: {solver} for that error", evaluations, "evaluations"))
    found = {solver: n for solver, n in least.items() if n is not None}
    mine = found.pop(default.solver, None)
    next_best = min(found, key=found.__getitem__, default=None)
    share = None if mine is None else mine / EULER_250.num_inference_steps
    over = None if mine is None or next_best is None else mine / found[next_best]
    rows.append(checked(f"{case.name}: {SHARE}", share, 0.25, barred))
    rows.append(checked(f"{case.name}: {FEWEST} ({next_best})", over, 1.0, barred))
    rows.append(checked(f"{case.name}: {RATIO}", case.error(default) / wanted, 1.0, barred))
    evaluations, error = case.counted(SamplerConfig(solver="dopri5"))
    rows.append(row(f"{case.name}: dopri5 per sample at its default tolerances", evaluations, "evaluations"))
    rows.append(row(f"{case.name}: its error", error, "rms"))
    return rows, curves, wanted


def plot(results: list[tuple[Problem, dict[str, Points], float]], path: Path) -> None:
    drawn = figure(5.4 * len(results), 4.6)
    axes = drawn.subplots(1, len(results), squeeze=False)[0]
    default = SamplerConfig().solver
    for axis, (case, curves, wanted) in zip(axes, results):
        for solver, points in curves.items():
            style = "x" if solver == "dopri5" else "o-"
            name = f"{solver} (the default)" if solver == default else solver
            axis.loglog(
                *zip(*points), style, ms=5 if style == "x" else 3, lw=2.5 if solver == default else 1, label=name
            )
        axis.axhline(wanted, color="k", ls=":", label="released Euler, 250 points")
        axis.set_title(case.name)
        axis.set_xlabel("network evaluations")
        axis.set_xticks(TICKS, [str(tick) for tick in TICKS])
        axis.set_xlim(2.5, 320)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("rms error of the final latents")
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=9)
    drawn.savefig(path, dpi=110)


def accuracy_rows(model: Path, golden: Path, picture: Path) -> list[dict]:
    """Rows of all networks at hand, and their plot; without the trained model its bars do not hold."""
    cases = []
    if model.is_dir():
        cases.append((demo_problem(model), True))
    if golden.is_dir():
        cases += [(golden_problem(golden, name), False) for name in ("sfd", "sync")]
    rows, drawn = [], []
    for case, barred in cases:
        found, curves, wanted = accuracy(case, barred)
        rows += found
        drawn.append((case, curves, wanted))
    if drawn:
        picture.parent.mkdir(parents=True, exist_ok=True)
        plot(drawn, picture)
    if not model.is_dir():
        note = f"not measured, no trained model in {model}: run `make demo`, or give --model"
        missing = ((SHARE, 0.25), (FEWEST, 1.0), (RATIO, 1.0), (LARGEST, 1.0))
        return rows + [checked(f"demo: {name}", None, bar, True) | {"note": note} for name, bar in missing]
    pipeline = SFDPipeline.from_pretrained(model, device="cpu")
    difference = pipeline.micro_batch_difference(torch.arange(64) % pipeline.config.num_classes, sizes=(1, 32))
    rows.append(row("demo: values that differ between micro-batches of 1 and 32", difference["share"], "share"))
    return rows + [checked(f"demo: {LARGEST}", difference["largest"], 1.0, True, "levels of 255")]
