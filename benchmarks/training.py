"""Whole training steps: ours against torch.compile with fused AdamW and against a step in the released manner.

    python benchmarks/training.py [--presets S B] [--batch 2] [--json F]

A step is noise, times, network, losses (REPA included), backward, optimizer and EMA; in fp32, on CUDA also in bf16
autocast.
    ours      fused operators, AdamW and EMA in one pass
    compiled  the same network in plain PyTorch under torch.compile, fused AdamW, foreach EMA
    released  plain PyTorch, each block compiled, default AdamW, an EMA loop over parameters
On a CPU: one thread, interleaved. Beside the times: the share of matrix products and attention in our step, and the
speed-up over plain eager PyTorch that would remain if everything else took no time (the cap).
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import sfd_kernels
import torch
from timing import Timing, device_time, interleave, machine
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from sfd_fast.config import OptimizerConfig, SFDConfig
from sfd_fast.config.presets import preset
from sfd_fast.diffusion.transport import training_loss
from sfd_fast.models.dit import LightningDiT
from sfd_fast.training.optimizer import AdamWEMA

RESULTS = Path(__file__).parent / "results"
DECAY = 0.9999
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "attention", "convolution")


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


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def ours(config: SFDConfig, batch: dict[str, Tensor], device: str, autocast: bool) -> Callable[[], None]:
    model = LightningDiT(config.model).to(device).train()
    settings = config.optimizer
    optimizer = AdamWEMA(
        parameters(model), lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps,
        weight_decay=settings.weight_decay, ema_decay=DECAY,
    )  # fmt: skip

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss, _ = training_loss(model, batch, config, seed=0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain(
    config: SFDConfig, batch: dict[str, Tensor], device: str, autocast: bool, *, manner: str
) -> Callable[[], None]:
    """manner: compiled, released, or eager (nothing compiled, fused AdamW)."""
    model = LightningDiT(config.model).to(device).train()
    params = parameters(model)
    optimizer = torch.optim.AdamW(
        params, lr=config.optimizer.lr, weight_decay=0.0, fused=True if manner != "released" else None
    )
    averages = [p.detach().clone() for p in params]
    network: Callable = model
    if manner == "compiled":
        network = torch.compile(model)
    elif manner == "released":
        for block in model.blocks:
            block.compile()

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


def share_of_products(step: Callable[[], None], device: str) -> float:
    """Share of a step's time that matrix products, convolution and attention take."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    step()
    with profile(activities=[activity]) as trace:
        step()
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = trace.key_averages()
    total = sum(getattr(event, key) for event in events)
    return sum(getattr(e, key) for e in events if any(name in e.key for name in PRODUCTS)) / total


def measure(name: str, size: int, device: str, autocast: bool, seconds: float) -> list[dict]:
    config = SFDConfig(model=replace(preset(name), class_dropout=0.1), optimizer=OptimizerConfig(ema_decay=DECAY))
    batch = batch_of(config, size, device)
    steps = {"ours": ours(config, batch, device, autocast)}
    steps |= {m: plain(config, batch, device, autocast, manner=m) for m in ("compiled", "released", "eager")}
    for step in steps.values():
        step()
    if device == "cuda":
        times: dict[str, Timing] = {manner: device_time(step) for manner, step in steps.items()}
        canary = None
    else:
        found, canary = interleave({m: [step] for m, step in steps.items()}, seconds=seconds, min_rounds=5)
        times = {manner: timings[0] for manner, timings in found.items()}
    share = share_of_products(steps["ours"], device)
    dtype = "bf16 mix" if autocast else "fp32"
    label = f"{name}/1 batch {size} {dtype}"
    rows = []
    for manner, timing in times.items():
        ratio = timing.low / times["ours"].low
        bar = 1.0 if manner in ("compiled", "released") and device == "cpu" else None
        rows.append({
            "name": f"{label}: {manner}", "value": timing.median, "unit": "ms", "low": timing.low, "high": timing.high,
            "ratio_to_ours": ratio, "images_per_s": size / timing.median * 1e3, "bar": bar,
            "holds": None if bar is None else bool(ratio >= bar),
        })  # fmt: skip
    cap = times["eager"].low / (share * times["ours"].low)
    rows.append({"name": f"{label}: share of matrix products in ours", "value": share, "unit": "share", "bar": None,
                 "holds": None})  # fmt: skip
    rows.append({"name": f"{label}: cap over eager that the products set", "value": cap, "unit": "ratio", "bar": None,
                 "holds": None})  # fmt: skip
    if canary is not None:
        rows.append({"name": f"{label}: canary spread", "value": canary.spread, "unit": "share", "bar": None,
                     "holds": None})  # fmt: skip
    return [row | machine(device) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["S", "B"])
    parser.add_argument("--batch", type=int, default=2, help="samples per step; 32 is usual on a GPU")
    parser.add_argument("--seconds", type=float, default=40.0, help="time to measure each preset on a CPU")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = options.json or RESULTS / f"training-{device}.json"
    if device == "cpu":
        torch.set_num_threads(1)
    rows = []
    for name in options.presets:
        for autocast in (False, True) if device == "cuda" else (False,):
            rows += measure(name, options.batch, device, autocast, options.seconds)
            torch._dynamo.reset()
            target.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        ratio = f"  {row['ratio_to_ours']:.2f} x ours" if "ratio_to_ours" in row else ""
        holds = "" if row["holds"] is None else f"  bar {row['bar']:.2f} holds {row['holds']}"
        print(f"{row['name']:<52}{row['value']:>11.3f} {row['unit']}{ratio}{holds}")


if __name__ == "__main__":
    main()
