"""Times every operator of the registry against its reference, torch.compile and, on CUDA, Liger-Kernel.

    python benchmarks/kernels.py [--ops NAME ...] [--modes fp32 mix] [--sizes XL B] [--json F] [--out DIR] [--seconds S]
    pytest benchmarks                     # the same cases under pytest-benchmark

One row for each operator, pass (forward; backward and both where there is a gradient), dtype mode and size. Times in ms
are medians (see timing.py for how); copy_ms is a copy of as many bytes as the operator must move at least; host_us is
the time of a whole call on tiny tensors. Batches: 8 images, or 256 where the operator would otherwise move less than
8 MiB. A run of everything replaces results/kernels-DEVICE.json, .csv and .png and the table of kernels/README.md; a
part is written only to --out. Prints the cases that lose.
"""

import argparse
import contextlib
import csv
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from readme import KERNELS_README, insert  # noqa: E402
from sfd_kernels import backends, reference_only, split_qkv  # noqa: E402
from sfd_kernels.registry import OPS, Op  # noqa: E402
from timing import Timing, device_time, host_us, interleave, machine, steady_memory  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
LARGE_COPY_MS = 0.2
"""smaller cases are judged by host time alone"""
CALLED_AS = {"qk_norm_rope": split_qkv}
"""what the model calls where that is not the operator itself: with v, whose gradient the kernel writes too"""


@dataclass(frozen=True)
class Case:
    """One operator at one dtype mode, size and batch."""

    op: Op
    mode: str
    size: str
    batch: int

    @property
    def label(self) -> str:
        return f"{self.op.name}-{self.mode}-{self.size}x{self.batch}"

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward", "backward", "both") if self.op.backward else ("forward",)


def make_cases(names: list[str] | None, modes: list[str], sizes: list[str]) -> list[Case]:
    """Cases of the named operators (all forward ones without names)."""
    unknown = set(names or ()) - set(OPS)
    if unknown:
        raise ValueError(f"unknown operators {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
    found = []
    for op in OPS.values():
        if not op.is_backward and (names is None or op.name in names):
            for mode in modes:
                for size in sizes:
                    args = next(op.examples(mode, size, 8))[1]
                    enough = op.bytes(*args) >= 8 << 20
                    found.append(Case(op, mode, size, 8 if enough else 256))
    return found


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in flat(item)] if isinstance(value, (tuple, list)) else []


class Provider:
    """One implementation of a case: forward() without gradients, and start() then finish(outputs) with them."""

    def __init__(self, function: Callable, op: Op, args: tuple, plain: bool) -> None:
        self.function, self.plain = function, plain
        self.args, self.trained = args, op.wanting_gradients(args)
        self.leaves = [tensor for tensor in flat(self.trained) if tensor.requires_grad]
        self.grads: list[Tensor] | None = None

    def forward(self) -> Any:
        with self.context(), torch.no_grad():
            return self.function(*self.args)

    def start(self) -> list[Tensor]:
        with self.context():
            return flat(self.function(*self.trained))

    def finish(self, outputs: list[Tensor]) -> None:
        torch.autograd.grad(outputs, self.leaves, self.output_gradients(outputs))

    def both(self) -> None:
        self.finish(self.start())

    def context(self) -> contextlib.AbstractContextManager:
        return reference_only() if self.plain else contextlib.nullcontext()

    def output_gradients(self, outputs: list[Tensor]) -> list[Tensor]:
        if self.grads is None:
            self.grads = [torch.randn_like(output) for output in outputs]
        return self.grads


def adamw_baselines(args: tuple) -> dict[str, Callable[..., None]]:
    """AdamW and EMA as the released code runs them, and the best that torch offers, on the same tensors."""
    params, grads, firsts, seconds, emas, _, lr, decay, step, *_ = args
    beta1, beta2, eps, weight_decay = args[11:]
    keep = decay.item()
    settings = {"lr": lr.item(), "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}

    def optimizer(**kind: bool) -> torch.optim.AdamW:
        leaves = [p.detach().requires_grad_() for p in params]
        for leaf, grad in zip(leaves, grads):
            leaf.grad = grad.to(leaf.dtype)
        made = torch.optim.AdamW(leaves, **settings, **kind)
        for leaf, first, second in zip(leaves, firsts, seconds):
            made.state[leaf] = {"step": torch.tensor(step.item()), "exp_avg": first, "exp_avg_sq": second}
        return made

    foreach, fused = optimizer(foreach=True), optimizer(fused=True)

    def foreach_then_loop(*_: Any) -> None:
        foreach.step()
        for ema, p in zip(emas, params):
            ema.mul_(keep).add_(p, alpha=1 - keep)

    def fused_then_lerp(*_: Any) -> None:
        fused.step()
        torch._foreach_lerp_(emas, params, 1 - keep)

    return {"foreach_and_ema_loop": foreach_then_loop, "fused_and_foreach_lerp": fused_then_lerp}


def liger_swiglu() -> Callable[..., Tensor] | None:
    """Liger-Kernel's SwiGLU on separate gate and up tensors, the layout it is written for; None without the package."""
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return None
    return LigerSiLUMulFunction.apply


def make_providers(case: Case, args: tuple, device: str, backend: str = "inductor") -> dict[str, Provider]:
    """reference, compile, ours, and what else has the operator."""
    op = case.op
    called = CALLED_AS.get(op.name, op)
    plain = op.reference if called is op else functools.partial(called)
    torch._dynamo.reset()
    compiled = torch.compile(plain, fullgraph=True, dynamic=False, backend=backend)
    found = {
        "reference": Provider(plain, op, args, True),
        "compile": Provider(compiled, op, args, True),
        "ours": Provider(called, op, args, False),
    }
    if op.name == "adamw_ema_step":
        for name, function in adamw_baselines(args).items():
            found[name] = Provider(function, op, args, False)
    if op.name == "swiglu" and device == "cuda":
        function = liger_swiglu()
        if function is None:
            print("Liger-Kernel is not installed, so it is not timed: pip install liger-kernel")
        else:
            halves = tuple(half.contiguous() for half in args[0].chunk(2, dim=-1))
            found["liger"] = Provider(function, op, halves, False)
            found["liger"].trained = tuple(half.requires_grad_() for half in halves)
            found["liger"].leaves = list(found["liger"].trained)
    return found


def least_bytes(case: Case, args: tuple, device: str) -> dict[str, int]:
    """Least bytes of each pass."""
    forward = case.op.bytes(*args)
    if not case.op.backward:
        return {"forward": forward}
    backward = case.op.backward.bytes(*next(case.op.backward.examples(case.mode, case.size, case.batch, device))[1])
    return {"forward": forward, "backward": backward, "both": forward + backward}


def copy_of(num_bytes: int, device: str) -> Callable[[], Any]:
    """A copy that reads one half of num_bytes and writes the other, between buffers that exist."""
    source = torch.ones(num_bytes // 8, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def time_cpu(case: Case, args: tuple, sizes: dict[str, int], seconds: float, backend: str) -> tuple[dict, float, float]:
    """{pass: {provider: Timing}}, and the canary's median and spread."""
    providers = make_providers(case, args, "cpu", backend)
    candidates = {name: (provider.forward,) for name, provider in providers.items()}
    candidates["copy"] = (copy_of(sizes["forward"], "cpu"),)
    timings, canary = interleave(candidates, seconds=seconds)
    found = {"forward": {name: steps[0] for name, steps in timings.items()}}
    if case.op.backward:
        candidates = {name: (provider.start, provider.finish) for name, provider in providers.items()}
        # Forward, backward and their sum come from the same samples: a sample of `both` runs the other two once more.
        whole = {f"{name} both": (provider.both,) for name, provider in providers.items()}
        copies = {f"copy {name}": (copy_of(sizes[name], "cpu"),) for name in ("backward", "both")}
        timings, canary = interleave({**candidates, **whole, **copies}, seconds=2 * seconds)
        found["backward"] = {name: timings[name][1] for name in providers}
        found["both"] = {name: timings[f"{name} both"][0] for name in providers}
        for name in ("backward", "both"):
            found[name]["copy"] = timings[f"copy {name}"][0]
    return found, canary.median, canary.spread


def time_cuda(case: Case, args: tuple, sizes: dict[str, int], backend: str) -> tuple[dict, float, float]:
    """As time_cpu; the canary is a copy of 256 MiB."""
    providers = make_providers(case, args, "cuda", backend)
    canary = device_time(copy_of(1 << 28, "cuda"))
    found: dict[str, dict[str, Timing]] = {name: {} for name in case.passes}
    for name, provider in providers.items():
        found["forward"][name] = device_time(provider.forward)
        if case.op.backward:
            found["both"][name] = device_time(provider.both)
            # Backward alone keeps its graph, which a compiled function allows only without donated buffers.
            with torch._functorch.config.patch(donated_buffer=False):
                torch._dynamo.reset()
                outputs = provider.start()
                grads = provider.output_gradients(outputs)
                again = functools.partial(torch.autograd.grad, outputs, provider.leaves, grads, retain_graph=True)
                found["backward"][name] = device_time(again)
    for name in case.passes:
        found[name]["copy"] = device_time(copy_of(sizes[name], "cuda"))
    return found, canary.median, canary.spread


def host_times(case: Case, device: str, backend: str) -> dict[str, dict[str, float]]:
    """Microseconds of a call on tiny tensors, by pass and provider; backward is the difference of both and forward."""
    args = next(case.op.examples(case.mode, "tiny", device=device))[1]
    found: dict[str, dict[str, float]] = {name: {} for name in case.passes}
    providers = make_providers(case, args, device, backend)
    for name in ("reference", "compile", "ours"):
        provider = providers[name]
        # The switch to the reference is thrown once, outside the loop: it is no part of a call.
        with provider.context():
            with torch.no_grad():
                found["forward"][name] = host_us(lambda: provider.function(*provider.args), device)  # noqa: B023
            if case.op.backward:
                outputs = provider.start()
                provider.finish(outputs)
                whole = host_us(lambda: provider.finish(flat(provider.function(*provider.trained))), device)  # noqa: B023
                started = host_us(lambda: provider.function(*provider.trained), device)  # noqa: B023
                found["both"][name], found["backward"][name] = whole, whole - started
    return found


def rows_of(case: Case, device: str, seconds: float, backend: str) -> Iterator[dict[str, Any]]:
    """The rows of one case."""
    args = next(case.op.examples(case.mode, case.size, case.batch, device))[1]
    sizes = least_bytes(case, args, device)
    if device == "cuda":
        timings, canary, canary_spread = time_cuda(case, args, sizes, backend)
    else:
        timings, canary, canary_spread = time_cpu(case, args, sizes, seconds, backend)
    host = host_times(case, device, backend)
    for name in case.passes:
        timed = timings[name]
        ours = timed["ours"]
        others = {other for other in timed if other not in ("reference", "compile", "ours", "copy")}
        yield {
            "operator": case.op.name,
            "pass": name,
            "dtype": case.mode,
            "shape": f"{case.size} x {case.batch}",
            **{f"{which}_ms": timed[which].median for which in ("reference", "compile", "ours", "copy")},
            "host_us": host[name]["ours"],
            "reference_host_us": host[name]["reference"],
            "compile_host_us": host[name]["compile"],
            "least_bytes": sizes[name],
            "gb_per_s": sizes[name] / ours.median / 1e6,
            "share_of_copy": timed["copy"].median / ours.median,
            "faster_than_compile": timed["compile"].median / ours.median,
            "faster_than_reference": timed["reference"].median / ours.median,
            "beyond_noise": ours.high < timed["compile"].low,
            **{f"{which}_spread": timed[which].spread for which in ("reference", "compile", "ours", "copy")},
            "others_ms": {other: timed[other].median for other in sorted(others)},
            "canary_ms": canary,
            "canary_spread": canary_spread,
            **machine(device),
        }


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
    """A table of forward and whole times of the rows, for README.md."""
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
            lines += ["", f"{row['operator']}, {row['shape']}, beside: {'; '.join(others)}."]
    large = whole_rows(rows)
    lines += [
        "",
        f"Geometric means over the {len(large)} cases whose copy takes {LARGE_COPY_MS} ms or more, forward + backward: "
        f"{geometric_mean([row['faster_than_compile'] for row in large]):.1f}x torch.compile, "
        f"{geometric_mean([row['faster_than_reference'] for row in large]):.1f}x eager. "
        f"{rows[0]['device']}, torch {rows[0]['torch']}.",
    ]
    return "\n".join(lines)


def prepare(device: str) -> None:
    """One thread and steady memory on a CPU."""
    if device == "cpu":
        torch.set_num_threads(1)
        steady_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", help="operators; default: all")
    parser.add_argument("--modes", nargs="+", help="fp32 bf16 fp16 mix; default fp32, on CUDA fp32 bf16 mix")
    parser.add_argument("--sizes", nargs="+", default=["XL", "B"], help="S B XL XXL")
    parser.add_argument("--seconds", type=float, default=1.0, help="of sampling for each case, CPU")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    parser.add_argument("--out", type=Path, help="folder of kernels-DEVICE.{json,csv,png}")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--readme", action="store_true", help="only put the stored rows into kernels/README.md")
    options = parser.parse_args()
    if options.readme:
        insert(KERNELS_README, "kernels-cpu", markdown(json.loads((RESULTS / "kernels-cpu.json").read_text())))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    modes = options.modes or (["fp32", "bf16", "mix"] if device == "cuda" else ["fp32"])
    prepare(device)
    print(*[f"{name}: {text}" for name, text in {**machine(device), **backends()}.items()], sep="\n")
    rows: list[dict] = []
    for case in make_cases(options.ops, modes, options.sizes):
        rows += rows_of(case, device, options.seconds, options.backend)
        print(f"measured {case.label}", file=sys.stderr)
    print_rows(rows)
    print_summary(rows)
    everything = options.ops is None and options.modes is None and options.out is None
    if everything or options.out:
        write_results(rows, options.out or RESULTS, f"kernels-{device}")
    if everything and device == "cpu":
        insert(KERNELS_README, "kernels-cpu", markdown(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def pytest_generate_tests(metafunc: Any) -> None:
    """One pytest-benchmark test for each case, pass and provider."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = [
        (case, name, provider)
        for case in make_cases(None, ["fp32"], ["XL"])
        for name in (("forward", "both") if case.op.backward else ("forward",))
        for provider in ("reference", "compile", "ours")
    ]
    ids = [f"{case.label}-{name}-{provider}" for case, name, provider in found]
    metafunc.parametrize("case,name,provider,device", [(*each, device) for each in found], ids=ids)


def test_kernel(benchmark: Any, case: Case, name: str, provider: str, device: str) -> None:
    """Times one provider; on CUDA every call waits for the device."""
    prepare(device)
    args = next(case.op.examples(case.mode, case.size, case.batch, device))[1]
    chosen = make_providers(case, args, device)[provider]
    function = chosen.forward if name == "forward" else chosen.both

    def call() -> None:
        function()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.label} {name}"
    benchmark(call)


if __name__ == "__main__":
    main()
