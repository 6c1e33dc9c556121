"""Images/s of the default sampler against an eager loop in the released manner, B/1 in fp32 with a B/1 guide.

Every candidate runs in a process of its own, as users run it: all cores, and the memory allocator as that program
leaves it (SFDPipeline keeps freed memory on a CPU, an eager loop does not). The processes take turns in a random order;
the others wait. A turn is one trajectory of EVALUATIONS guided evaluations; decoding is left out, as it is the same.
All of them work at the pipeline's default micro-batch, which carries the bar, and then at a smaller one.
The cap: the matrix products and attention of the same evaluations alone, with freed memory kept.
"""

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from released_manner import guided_euler, matrix_products, random_network
from timing import Timing, machine, spin
from torch import Tensor

from sfd_fast.config import GuidanceConfig, SamplerConfig, TextureConfig
from sfd_fast.config.presets import B
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.models.texture import TextureCodec
from sfd_fast.sampling.allocator import keep_freed_memory
from sfd_fast.sampling.pipeline import DEFAULT_MICRO_BATCH, SFDPipeline

EVALUATIONS = 3  # one for each stage
ROUNDS = 5
MICRO_BATCHES = (DEFAULT_MICRO_BATCH, 8)
DELTA_T, SCALE = 0.3, 1.5
RELEASED = "released manner, eager"
BARRED = "ours, eager (the default)"
CANDIDATES = (
    RELEASED, "released manner, eager, freed memory kept", BARRED, "ours, compile", "matrix products and attention",
)  # fmt: skip


def candidate(name: str, batch: int) -> Callable[[], Tensor | None]:
    """One trajectory of a micro-batch; the same networks, noise and labels for every name."""
    torch.manual_seed(0)
    main, guide = random_network(B), random_network(B)
    labels, config = torch.arange(batch), main.config
    noise = torch.randn(batch, config.channels, config.grid_size, config.grid_size)
    if name.startswith("ours"):
        pipeline = SFDPipeline(
            main, guide=guide, statistics=LatentStatistics.identity(config.texture_channels, config.semantic_channels),
            texture_codec=TextureCodec(TextureConfig(channels=32, num_res_blocks=1)), delta_t=DELTA_T,
            micro_batch_size=batch, device="cpu", backend="compile" if name.endswith("compile") else "eager",
        )  # fmt: skip
        guidance = GuidanceConfig(mode="autoguidance", scale=SCALE)
        compare(pipeline, guidance, labels)
        settings = SamplerConfig(num_inference_steps=EVALUATIONS)
        return lambda: pipeline.sample_latents(labels, noise, settings, guidance)
    if name.endswith("kept") or name.startswith("matrix"):
        keep_freed_memory()
    if name.startswith("matrix"):
        return lambda: [matrix_products(m, batch) for _ in range(EVALUATIONS) for m in (main, guide)] and None
    grid = torch.linspace(0, 1 + DELTA_T, EVALUATIONS + 1)
    return lambda: guided_euler(main, guide, noise, labels, grid=grid, delta_t=DELTA_T, scale=SCALE)


def compare(pipeline: SFDPipeline, guidance: GuidanceConfig, labels: Tensor) -> None:
    """The pipeline on the released grid gives the released manner's latents. Raises AssertionError otherwise."""
    settings = SamplerConfig(solver="euler", num_inference_steps=EVALUATIONS, grid="released")
    noise = pipeline.initial_noise(labels, 0)
    ours = pipeline.sample_latents(labels, noise, settings, guidance)
    grid = torch.linspace(0, 1 + DELTA_T, EVALUATIONS + 1)
    theirs = guided_euler(pipeline.transformer, pipeline.guide, noise, labels, grid=grid, delta_t=DELTA_T, scale=SCALE)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def work(name: str, batch: int) -> None:
    """A candidate's process: after warming up, one trajectory for every line that comes in, its seconds out."""
    run = candidate(name, batch)
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


def speed_rows(batch: int, rounds: int = ROUNDS, threads: int | None = None) -> list[dict]:
    """Rows of images/s, the ratio with its quartiles (barred at the default micro-batch), and the cap."""
    threads = threads or torch.get_num_threads()
    command = [sys.executable, __file__, "--batch", str(batch), "--threads", str(threads), "--candidate"]
    workers = {}
    for name in CANDIDATES:
        workers[name] = subprocess.Popen(
            [*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        if workers[name].stdout.readline().strip() != "ready":
            raise RuntimeError(f"the process of '{name}' did not start")
    seconds: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    canary, chance = [], random.Random(0)
    for _ in range(rounds):
        canary.append(spin())
        for name in chance.sample(CANDIDATES, len(CANDIDATES)):
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

    def ratio(name: str) -> list[float]:
        return [a / b for a, b in zip(seconds[RELEASED], seconds[name])]

    rows = [
        row(f"B/1 with guide, micro-batch {batch}: {name}", [batch / s for s in seconds[name]],
            f"images/s at {EVALUATIONS} evaluations")
        for name in CANDIDATES[:-1]
    ]  # fmt: skip
    bar = 1.5 if batch == DEFAULT_MICRO_BATCH else None
    title = f"B/1 with guide, fp32, micro-batch {batch}: the default over the released manner"
    rows.append(row(title, ratio(BARRED), "ratio", bar))
    for name in CANDIDATES[1:]:
        if name != BARRED:
            rows.append(row(f"  micro-batch {batch}, over the released manner: {name}", ratio(name), "ratio"))
    rows.append(row("  canary (fixed loop, steadiness of the machine)", canary, "ms"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=MICRO_BATCHES, help="micro-batch sizes")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, help="default: torch's own choice, one per core")
    parser.add_argument("--candidate", choices=CANDIDATES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
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
