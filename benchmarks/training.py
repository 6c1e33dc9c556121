"""Whole training steps: ours against torch.compile with fused AdamW and against a step in the released manner.

    python benchmarks/training.py [--presets S B] [--batch N] [--precisions fp32 bf16] [--manners ...] [--json F]

A step is noise, times, network, losses (REPA included), backward, optimizer and EMA; fp32, or bf16 autocast over fp32
weights ("bf16 mix", the precision SFD is trained in), which is all that CUDA measures and what a CPU measures beside
fp32 where it has bf16 units.
    ours           the torch engine: fused operators, AdamW and EMA in one pass
    ours_compiled  ours under train.compile
    graphed        ours as one CUDA graph (train.cuda_graph; on a CPU the same step as ours)
    deterministic  ours under train.deterministic (CUDA only: it changes nothing on a CPU)
    compiled       the same network in plain PyTorch under torch.compile, fused AdamW, foreach EMA
    blocks         plain PyTorch, each block compiled, fused AdamW, foreach EMA
    released       plain PyTorch, each block compiled, default AdamW, an EMA loop over parameters
    eager          plain PyTorch, nothing compiled, fused AdamW, foreach EMA
On a CPU: one thread, interleaved, freed memory kept in the process for all. On CUDA: one manner at a time in memory;
wall time over several steps as they run, and apart from it the time in which the device was busy, and the peak memory.
Beside the times: the share of matrix products and attention in our step, and the speed-up over plain eager PyTorch that
would remain if everything else took no time (the cap).
"""

import argparse
import contextlib
import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import sfd_kernels
import torch
from timing import Timing, has_bf16_units, interleave, machine, profile_step, steady_memory, wall_time
from torch import Tensor, nn

from sfd_fast.config import ModelConfig, OptimizerConfig, SFDConfig, TrainConfig
from sfd_fast.config.presets import preset
from sfd_fast.diffusion.transport import training_loss
from sfd_fast.models.dit import LightningDiT
from sfd_fast.training.deterministic import deterministic_algorithms
from sfd_fast.training.engines.graphed import WARM_UP_STEPS, GraphedStep, capture
from sfd_fast.training.engines.torch import TorchEngine

RESULTS = Path(__file__).parent / "results"
DECAY = 0.9999
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "_linear_pointwise", "attention", "convolution")
CPU_MANNERS = ("ours", "ours_compiled", "compiled", "blocks", "released", "eager")
CUDA_MANNERS = ("ours", "graphed", "deterministic", "eager", "released")
MANNERS = ("ours", "ours_compiled", "graphed", "deterministic", "compiled", "blocks", "released", "eager")
OURS = ("ours", "ours_compiled", "graphed", "deterministic")
BATCH = {"S": 8, "B": 4}
"""samples per step where --batch does not say; 2 for other presets"""
BARS = {
    "fp32": {"compiled": 1.0, "blocks": 1.0, "ours_compiled": 1.0},
    "bf16 mix": {"compiled": 1.6, "blocks": 1.6, "eager": 2.8, "ours_compiled": 1.0},
}
"""on a CPU: a manner's median over ours is to be at least this"""


def settings(model: ModelConfig) -> SFDConfig:
    return SFDConfig(model=replace(model, class_dropout=0.1), optimizer=OptimizerConfig(ema_decay=DECAY))


def batch_of(config: SFDConfig, size: int, device: str) -> dict[str, Tensor]:
    model, side = config.model, config.model.grid_size // config.model.patch_size
    generator = torch.Generator().manual_seed(0)
    made = {
        "latents": torch.randn(size, model.channels, model.grid_size, model.grid_size, generator=generator),
        "labels": torch.randint(model.num_classes, (size,), generator=generator),
        "sample_ids": torch.arange(size),
        "features": torch.randn(size, model.repa_channels, side, side, generator=generator),
    }
    return {name: value.to(device) for name, value in made.items()}


def network_of(config: SFDConfig, device: str) -> tuple[nn.Module, list[nn.Parameter]]:
    with torch.device(device):
        model = LightningDiT(config.model).train()
    return model, [p for p in model.parameters() if p.requires_grad]


def ours(
    config: SFDConfig, batch: dict[str, Tensor], device: str, autocast: bool, manner: str, backend: str
) -> Callable[[], object]:
    """A step of the torch engine, as `sfd train` runs it: the norm of the gradient and the check for bad steps too."""
    model, _ = network_of(config, device)
    engine = TorchEngine(
        model, lambda network, batch: training_loss(network, batch, config, seed=0), optimizer=config.optimizer,
        train=TrainConfig(precision="parity" if autocast else "fp32"), device=torch.device(device),
    )  # fmt: skip
    step: Callable = engine.step
    if manner == "ours_compiled":
        engine.network = torch.compile(model, backend=backend)
    if manner == "graphed":
        step = GraphedStep(step, torch.device(device), capture if device == "cuda" else lambda recorded: recorded)
    return lambda: step([batch], config.optimizer.lr)


def plain(
    config: SFDConfig, batch: dict[str, Tensor], device: str, autocast: bool, *, manner: str, backend: str
) -> Callable[[], None]:
    """manner: compiled, blocks, released or eager; backend: of torch.compile."""
    model, params = network_of(config, device)
    optimizer = torch.optim.AdamW(
        params, lr=config.optimizer.lr, weight_decay=0.0, fused=True if manner != "released" else None
    )
    averages = [p.detach().clone() for p in params]
    network: Callable = model
    if manner == "compiled":
        network = torch.compile(model, backend=backend)
    elif manner in ("blocks", "released"):
        for block in model.blocks:
            block.compile(backend=backend)

    def step() -> None:
        with sfd_kernels.reference_only():
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                loss, _ = training_loss(network, batch, config, seed=0)
            loss.backward()
        optimizer.step()
        with torch.no_grad():
            if manner == "released":
                for average, param in zip(averages, params):
                    average.mul_(DECAY).add_(param, alpha=1 - DECAY)
            else:
                torch._foreach_lerp_(averages, params, 1 - DECAY)
        optimizer.zero_grad()

    return step


@contextlib.contextmanager
def step_in(
    manner: str, config: SFDConfig, batch: dict[str, Tensor], device: str, autocast: bool, backend: str = "inductor"
) -> Iterator[Callable[[], None]]:
    """The step of a manner; network and optimizer are gone from memory afterwards."""
    algorithms = deterministic_algorithms() if manner == "deterministic" else contextlib.nullcontext()
    with algorithms:
        if manner in OURS:
            yield ours(config, batch, device, autocast, manner, backend)
        else:
            yield plain(config, batch, device, autocast, manner=manner, backend=backend)
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def wait_for(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def measure_alone(
    manner: str, config: SFDConfig, batch: dict[str, Tensor], device: str, autocast: bool, backend: str = "inductor"
) -> tuple[Timing, dict]:
    """Wall time of one manner, with nothing else in memory; and busy_ms, launches, peak_gib, products (a share)."""
    with step_in(manner, config, batch, device, autocast, backend) as step:
        for _ in range(WARM_UP_STEPS + 1):  # the one after them captures
            step()
        wait_for(device)()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        timing = wall_time(step, wait_for(device))
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
        seen = profile_step(step, device, {"products": PRODUCTS})
        del step
    more = {"busy_ms": seen.busy_ms, "launches": seen.launches, "peak_gib": peak, "products": seen.shares["products"]}
    return timing, more


def measure_cpu(
    config: SFDConfig, batch: dict[str, Tensor], autocast: bool, manners: tuple[str, ...], seconds: float
) -> dict:
    """{manner: (Timing, {})} interleaved, of ours with the share of products, and the canary."""
    with contextlib.ExitStack() as stack:
        steps = {m: stack.enter_context(step_in(m, config, batch, "cpu", autocast)) for m in manners}
        found, canary = interleave({m: [step] for m, step in steps.items()}, seconds=seconds, min_rounds=5)
        times = {manner: (timings[0], {}) for manner, timings in found.items()}
        seen = profile_step(steps["ours"], "cpu", {"products": PRODUCTS})
    times["ours"] = (times["ours"][0], {"products": seen.shares["products"]})
    return times | {"canary": canary}


def rows_of(label: str, size: int, times: dict[str, tuple[Timing, dict]], bars: dict[str, float]) -> list[dict]:
    """A row for each manner with its ratio to ours (of medians; of quartiles), the share of products, and the cap."""
    rows, own = [], times["ours"][0]
    for manner, (timing, more) in times.items():
        ratio = timing.median / own.median
        bar = bars.get(manner)
        rows.append({
            "name": f"{label}: {manner}", "value": timing.median, "unit": "ms", "low": timing.low, "high": timing.high,
            "ratio_to_ours": ratio, "ratio_low": timing.low / own.high, "ratio_high": timing.high / own.low,
            "images_per_s": size / timing.median * 1e3, "bar": bar,
            "holds": None if bar is None else bool(ratio >= bar), **more,
        })  # fmt: skip
    share = times["ours"][1]["products"]
    rows.append(fact(f"{label}: share of matrix products and attention in ours", share, "share"))
    if share > 0:
        products = share * (times["ours"][1].get("busy_ms") or own.median)
        for manner in ("eager", "compiled", "blocks"):
            if manner in times:
                cap = times[manner][0].median / products
                rows.append(fact(f"{label}: cap over {manner} that they set", cap, "ratio"))
    return rows


def fact(name: str, value: float, unit: str) -> dict:
    return {"name": name, "value": value, "unit": unit, "bar": None, "holds": None}


def measure(
    name: str, size: int | None, device: str, autocast: bool, manners: tuple[str, ...], seconds: float
) -> list[dict]:
    config, size = settings(preset(name)), size or BATCH.get(name, 2)
    batch = batch_of(config, size, device)
    precision = "bf16 mix" if autocast else "fp32"
    label = f"{name}/1 batch {size} {precision}"
    if device == "cuda":
        rows = rows_of(label, size, {m: measure_alone(m, config, batch, device, autocast) for m in manners}, {})
    else:
        times = measure_cpu(config, batch, autocast, manners, seconds)
        canary = times.pop("canary")
        rows = rows_of(label, size, times, BARS[precision])
        rows.append(fact(f"{label}: canary spread", canary.spread, "share"))
    return [row | machine(device) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["S", "B"])
    parser.add_argument("--batch", type=int, help="samples per step; 32 is usual on a GPU; default S 8, B 4, else 2")
    parser.add_argument(
        "--precisions", nargs="+", choices=["fp32", "bf16"], help="default: what the device is made for"
    )
    parser.add_argument("--manners", nargs="+", choices=MANNERS, help="ours is always among them")
    parser.add_argument("--seconds", type=float, default=40.0, help="time to measure each preset on a CPU")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = options.json or RESULTS / f"training-{device}.json"
    if device == "cpu":
        torch.set_num_threads(1)
        steady_memory()
    manners = tuple(options.manners or (CUDA_MANNERS if device == "cuda" else CPU_MANNERS))
    manners = ("ours", *(m for m in manners if m != "ours"))
    defaults = ["bf16"] if device == "cuda" else ["fp32", "bf16"] if has_bf16_units() else ["fp32"]
    rows = []
    for precision in options.precisions or defaults:
        for name in options.presets:
            rows += measure(name, options.batch, device, precision == "bf16", manners, options.seconds)
            target.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        ratio = f"  {row['ratio_to_ours']:.2f} x ours" if "ratio_to_ours" in row else ""
        holds = "" if row["holds"] is None else f"  bar {row['bar']:.2f} holds {row['holds']}"
        print(f"{row['name']:<66}{row['value']:>11.3f} {row['unit']}{ratio}{holds}")


if __name__ == "__main__":
    main()
