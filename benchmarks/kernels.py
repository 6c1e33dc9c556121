"""Times every operator of the registry against its reference, torch.compile and, on CUDA, Liger-Kernel.

    python benchmarks/kernels.py [--ops NAME ...] [--modes fp32 mix bf16] [--sizes XL B] [--json F] [--out DIR]
                                 [--seconds S]
    pytest benchmarks                     # the same cases under pytest-benchmark

One row for each operator, pass (forward; backward and both where there is a gradient), dtype mode and size. Times in ms
are medians (see timing.py for how); copy_ms is a copy of as many bytes as the operator must move at least; host_us is
the time of a whole call on tiny tensors. Batches: 8 images, or 256 where the operator would otherwise move less than
8 MiB. mix is what autocast makes of fp32 weights: a residual stream, weights and data in fp32, what Linears return in
bf16. A CPU without bf16 units is measured in fp32 alone. A run of everything replaces results/kernels-DEVICE.json, .csv
and .png and the table of kernels/README.md; a part is written only to --out. Prints the cases that lose.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kernel_providers import flat, make_providers  # noqa: E402
from kernel_tables import markdown, print_rows, print_summary, write_results  # noqa: E402
from readme import KERNELS_README, insert  # noqa: E402
from sfd_kernels import backends  # noqa: E402
from sfd_kernels.registry import OPS, Op  # noqa: E402
from timing import Timing, device_time, has_bf16_units, host_us, interleave, machine, steady_memory  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"


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


def make_cases(names: list[str] | None, modes: list[str], sizes: list[str], device: str) -> list[Case]:
    """Cases of the named operators (all forward ones of the device without names)."""
    unknown = set(names or ()) - set(OPS)
    if unknown:
        raise ValueError(f"unknown operators {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
    found = []
    for op in OPS.values():
        of_device = device == "cpu" or not op.on_cuda
        if not op.is_backward and (of_device if names is None else op.name in names):
            for mode in modes:
                for size in sizes:
                    args = next(op.examples(mode, size, 8))[1]
                    enough = op.bytes(*args) >= 8 << 20
                    found.append(Case(op, mode, size, 8 if enough else 256))
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
    providers = make_providers(case.op, args, "cpu", backend)
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
    providers = make_providers(case.op, args, "cuda", backend)
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
    providers = make_providers(case.op, args, device, backend)
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


def prepare(device: str) -> None:
    """One thread and steady memory on a CPU."""
    if device == "cpu":
        torch.set_num_threads(1)
        steady_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", help="operators; default: all")
    parser.add_argument("--modes", nargs="+", help="fp32 mix bf16 fp16; default fp32 mix bf16")
    parser.add_argument("--sizes", nargs="+", default=["XL"], help="S B XL XXL")
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
    modes = options.modes or (["fp32", "mix", "bf16"] if device == "cuda" or has_bf16_units() else ["fp32"])
    prepare(device)
    print(*[f"{name}: {text}" for name, text in {**machine(device), **backends()}.items()], sep="\n")
    rows: list[dict] = []
    for case in make_cases(options.ops, modes, options.sizes, device):
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
        for case in make_cases(None, ["fp32"], ["XL"], device)
        for name in (("forward", "both") if case.op.backward else ("forward",))
        for provider in ("reference", "compile", "ours")
    ]
    ids = [f"{case.label}-{name}-{provider}" for case, name, provider in found]
    metafunc.parametrize("case,name,provider,device", [(*each, device) for each in found], ids=ids)


def test_kernel(benchmark: Any, case: Case, name: str, provider: str, device: str) -> None:
    """Times one provider; on CUDA every call waits for the device."""
    prepare(device)
    args = next(case.op.examples(case.mode, case.size, case.batch, device))[1]
    chosen = make_providers(case.op, args, device)[provider]
    function = chosen.forward if name == "forward" else chosen.both

    def call() -> None:
        function()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.label} {name}"
    benchmark(call)


if __name__ == "__main__":
    main()
