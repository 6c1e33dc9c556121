"""Images/s of the default sampler against loops in the released manner, B/1 with a B/1 guide, fp32 and bf16.

Every candidate runs in a process of its own, as users run it, on one thread, with the memory allocator as that program
leaves it (SFDPipeline keeps freed memory on a CPU, an eager loop does not). The processes take turns in a random order;
the others wait. A turn is one trajectory of EVALUATIONS guided evaluations; decoding is left out, as it is the same.
All of them work at the pipeline's default micro-batch and at a smaller one. bf16 of the released manner is autocast
over fp32 weights; ours holds bf16 weights, which is its default on a CPU with bf16 units. Without those only fp32 is
measured. The cap: the matrix products and attention (torch's) of the same evaluations alone, with freed memory kept.
"""

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from released_manner import guided_euler, matrix_products, network, random_network
from timing import Timing, has_bf16_units, machine, spin
from torch import Tensor

from sfd_fast.config import GuidanceConfig, SamplerConfig, TextureConfig
from sfd_fast.config.presets import B
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.models.dit import LightningDiT
from sfd_fast.models.texture import TextureCodec
from sfd_fast.sampling.allocator import keep_freed_memory
from sfd_fast.sampling.pipeline import DEFAULT_MICRO_BATCH, SFDPipeline

EVALUATIONS = 3  # one for each stage
ROUNDS = 5
MICRO_BATCHES = (DEFAULT_MICRO_BATCH, 8)
DELTA_T, SCALE = 0.3, 1.5
RELEASED = {"fp32": "released manner, fp32", "bf16": "released manner, bf16"}
OURS = {"fp32": "ours, fp32", "bf16": "ours, bf16"}
CANDIDATES = {
    "fp32": (
        RELEASED["fp32"], "released manner, fp32, freed memory kept", OURS["fp32"], "products and attention, fp32"
    ),
    "bf16": (
        RELEASED["bf16"], "released manner, bf16, torch.compile", "released manner, bf16, freed memory kept",
        OURS["bf16"], "ours, bf16, compile", "products and attention, bf16",
    ),
}  # fmt: skip
BARS = {("bf16", "bf16"): 3.0, ("bf16", "fp32"): 6.0, ("fp32", "fp32"): 1.5}
"""(our precision, theirs): how much faster ours is to be"""


def candidate(name: str, batch: int) -> Callable[[], Tensor | None]:
    """One trajectory of a micro-batch; the same networks, noise and labels for every name."""
    torch.manual_seed(0)
    main, guide = random_network(B), random_network(B)
    labels, config = torch.arange(batch), main.config
    noise = torch.randn(batch, config.channels, config.grid_size, config.grid_size)
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    if name.startswith("ours"):
        pipeline = SFDPipeline(
            main, guide=guide, statistics=LatentStatistics.identity(config.texture_channels, config.semantic_channels),
            texture_codec=TextureCodec(TextureConfig(channels=32, num_res_blocks=1)), delta_t=DELTA_T,
            micro_batch_size=batch, device="cpu", torch_dtype=dtype,
            backend="compile" if name.endswith("compile") else "eager",
        )  # fmt: skip
        guidance = GuidanceConfig(mode="autoguidance", scale=SCALE)
        compare(pipeline, guidance, labels, main, guide)
        settings = SamplerConfig(num_inference_steps=EVALUATIONS)
        return lambda: pipeline.sample_latents(labels, noise, settings, guidance)
    if name.endswith("kept") or name.startswith("products"):
        keep_freed_memory()
    if name.startswith("products"):
        main, guide = main.to(dtype), guide.to(dtype)
        return lambda: [matrix_products(m, batch) for _ in range(EVALUATIONS) for m in (main, guide)] and None
    grid = torch.linspace(0, 1 + DELTA_T, EVALUATIONS + 1)
    run = torch.compile(network) if name.endswith("torch.compile") else network

    def released() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return guided_euler(main, guide, noise, labels, grid=grid, delta_t=DELTA_T, scale=SCALE, network=run)

    return released


def compare(
    pipeline: SFDPipeline, guidance: GuidanceConfig, labels: Tensor, main: LightningDiT, guide: LightningDiT
) -> None:
    """The pipeline on the released grid gives the released manner's fp32 latents. Raises AssertionError otherwise."""
    settings = SamplerConfig(solver="euler", num_inference_steps=EVALUATIONS, grid="released")
    noise = pipeline.initial_noise(labels, 0)
    ours = pipeline.sample_latents(labels, noise, settings, guidance)
    grid = torch.linspace(0, 1 + DELTA_T, EVALUATIONS + 1)
    theirs = guided_euler(main, guide, noise, labels, grid=grid, delta_t=DELTA_T, scale=SCALE)
    if pipeline.precision == "fp32":
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    else:
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


def work(name: str, batch: int) -> None:
    """A candidate's process: after warming up, one trajectory for every line that comes in, its seconds out."""
    run = candidate(name, batch)
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


def precisions() -> list[str]:
    return ["fp32", "bf16"] if has_bf16_units() else ["fp32"]


def speed_rows(batch: int, rounds: int = ROUNDS, threads: int = 1) -> list[dict]:
    """Rows of images/s, the barred ratios with their quartiles, and the caps."""
    measured = precisions()
    names = [name for precision in measured for name in CANDIDATES[precision]]
    command = [sys.executable, __file__, "--batch", str(batch), "--threads", str(threads), "--candidate"]
    workers = {}
    for name in names:
        workers[name] = subprocess.Popen(
            [*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        if workers[name].stdout.readline().strip() != "ready":
            raise RuntimeError(f"the process of '{name}' did not start")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    canary, chance = [], random.Random(0)
    for _ in range(rounds):
        canary.append(spin())
        for name in chance.sample(names, len(names)):
            workers[name].stdin.write("go\n")
            seconds[name].append(float(workers[name].stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    where = machine("cpu") | {"threads": threads, "rounds": rounds}

    def row(name: str, values: list[float], unit: str, bar: float | None = None) -> dict:
        found = Timing.of(values)
        holds = None if bar is None else found.median >= bar
        return {"name": name, "value": found.median, "low": found.low, "high": found.high, "unit": unit, "bar": bar,
                "holds": holds, **where}  # fmt: skip

    def ratio(slow: str, fast: str) -> list[float]:
        return [a / b for a, b in zip(seconds[slow], seconds[fast])]

    rows = [
        row(f"B/1 with guide, micro-batch {batch}: {name}", [batch / s for s in seconds[name]],
            f"images/s at {EVALUATIONS} evaluations")
        for name in names
    ]  # fmt: skip
    for (own, theirs), bar in BARS.items():
        if own in measured:
            title = f"micro-batch {batch}: ours, {own}, over the released manner, {theirs}"
            rows.append(row(title, ratio(RELEASED[theirs], OURS[own]), "ratio", bar))
    for precision in measured:
        for name in CANDIDATES[precision]:
            if name not in (RELEASED[precision], OURS[precision]):
                title = f"  micro-batch {batch}, over the released manner, {precision}: {name}"
                rows.append(row(title, ratio(RELEASED[precision], name), "ratio"))
    rows.append(row("  canary (fixed loop, steadiness of the machine)", canary, "ms"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=MICRO_BATCHES, help="micro-batch sizes")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--candidate", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    if options.candidate:
        work(options.candidate, options.batch[0])
        return
    for batch in options.batch:
        for row in speed_rows(batch, options.rounds, options.threads):
            print(f"{row['name']:<82}{row['value']:>9.3f} ({row['low']:.3f} to {row['high']:.3f}) {row['unit']}")


if __name__ == "__main__":
    main()
