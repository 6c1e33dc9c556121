"""Timers that benchmarks share: interleaved candidates on a CPU, device time on CUDA, host time, canary, machine.

On a CPU: one thread; every round runs each candidate once, in a new random order, so that a slow moment of the machine
hits all of them; a fixed loop (the canary) is timed in every round and tells how steady the machine was.
On CUDA: triton's do_bench (L2 flushed) with a busy-wait kernel before every sample, long enough for the host to queue
the sample behind it: gaps between launches are not timed. Whole steps are timed as they run instead, by the wall
clock over several of them, and beside it the time in which the device was busy.
"""

import contextlib
import ctypes
import functools
import gc
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Steps = Sequence[Callable]
"""What one sample runs: the first takes nothing, each further one what the one before returned; each is timed."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one step: median and quartiles."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """(high - low) / median."""
        return (self.high - self.low) / self.median

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(ordered[(last + 1) // 2], ordered[round(0.25 * last)], ordered[round(0.75 * last)])


def spin() -> float:
    """Milliseconds of a fixed loop of about 0.3 ms that touches no memory."""
    start = time.perf_counter()
    value = 0
    for _ in range(8000):
        value = (value * 5 + 1) & 0xFFFF
    return (time.perf_counter() - start) * 1e3


def steady_memory() -> None:
    """Keeps freed memory in the process (glibc), as allocators of training processes do: page faults are not timed."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping for each large block
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never given back


def _sample(steps: Steps, repeats: int) -> list[float]:
    clock = time.perf_counter
    totals = [0.0] * len(steps)
    for _ in range(repeats):
        value = None
        for index, step in enumerate(steps):
            start = clock()
            value = step() if index == 0 else step(value)
            totals[index] += clock() - start
    return [total / repeats * 1e3 for total in totals]


def interleave(
    candidates: dict[str, Steps], *, seconds: float = 2.0, min_rounds: int = 9, max_rounds: int = 50
) -> tuple[dict[str, list[Timing]], Timing]:
    """Timings of every step of every candidate, and of the canary; CPU only.

    Each candidate gets at least 0.5 ms a sample; rounds go on for `seconds` within the given bounds.
    """
    repeats, samples = {}, {name: [] for name in candidates}
    for name, steps in candidates.items():
        _sample(steps, 1)
        repeats[name] = max(1, min(2000, int(0.5 / max(sum(_sample(steps, 1)), 1e-4))))
        _sample(steps, repeats[name])
    canary, order, chance = [], list(candidates), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        while len(canary) < min_rounds or (len(canary) < max_rounds and time.perf_counter() - start < seconds):
            chance.shuffle(order)
            for name in order:
                samples[name].append(_sample(candidates[name], repeats[name]))
            canary.append(spin())
    finally:
        gc.enable()
    return {name: [Timing.of(step) for step in zip(*found)] for name, found in samples.items()}, Timing.of(canary)


def host_us(function: Callable[[], Any], device: str, *, seconds: float = 0.05) -> float:
    """Microseconds that the host spends in one call, the best of five loops; nothing waits for the device in a loop."""
    for _ in range(3):
        function()
    start = time.perf_counter()
    function()
    repeats = max(5, int(seconds / 5 / max(time.perf_counter() - start, 1e-6)))
    best = float("inf")
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        best = min(best, (time.perf_counter() - start) / repeats * 1e6)
    return best


@contextlib.contextmanager
def backlog(seconds: float) -> Iterator[None]:
    """Inside, do_bench's flush of the cache is followed by a busy-wait of that length on the device."""
    from triton import runtime

    driver = runtime.driver.active
    flush = driver.clear_cache
    cycles = int(seconds * cycles_per_second())

    def flush_and_wait(cache: Any) -> None:
        flush(cache)
        torch.cuda._sleep(cycles)

    driver.clear_cache = flush_and_wait
    try:
        yield
    finally:
        del driver.clear_cache  # the method of the class again


@functools.cache
def cycles_per_second() -> float:
    """Cycles that torch.cuda._sleep spends in a second on this device, measured over 20 million of them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1000)
    start.record()
    torch.cuda._sleep(20_000_000)
    end.record()
    torch.cuda.synchronize()
    return 20_000_000 / (start.elapsed_time(end) * 1e-3)


def device_time(function: Callable[[], Any], *, rep_ms: int = 100) -> Timing:
    """Device time of function on CUDA."""
    from triton.testing import do_bench

    wait = 1.5e-6 * host_us(function, "cuda")
    with backlog(wait):
        rep = int(rep_ms * (1 + wait * 1e3))
        low, median, high = do_bench(function, rep=rep, quantiles=[0.25, 0.5, 0.75])
    return Timing(median, low, high)


def wall_time(
    step: Callable[[], Any], wait: Callable[[], Any], *, num_steps: int = 5, num_windows: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:  # fmt: skip
    """Milliseconds of one step as it runs, over windows of num_steps; wait() returns when the device has finished."""
    samples = []
    wait()
    for _ in range(num_windows):
        start = clock()
        for _ in range(num_steps):
            step()
        wait()
        samples.append((clock() - start) / num_steps * 1e3)
    return Timing.of(samples)


def busy_ms(spans: Iterable[tuple[float, float]]) -> float:
    """Milliseconds in which at least one of the spans (start, end in microseconds) ran."""
    busy, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e3


@dataclass(frozen=True)
class Profile:
    """What one step did, from torch.profiler."""

    busy_ms: float
    """time in which the device (on a CPU: an operator) ran anything"""
    shares: dict[str, float]
    """of the time of all kernels (on a CPU: operators): what the operators whose names hold a word took"""
    launches: int
    """kernels and copies on the device; 0 on a CPU"""


def profile_step(
    step: Callable[[], Any], device: str, words: dict[str, tuple[str, ...]], num_steps: int = 2
) -> Profile:
    """Profiles num_steps steps. words: {share's name: parts of operators' names}, for example {"x": ("aten::mm",)}.

    Both activities are recorded on CUDA: a kernel's own name does not say which operator launched it.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    step()
    with profile(activities=activities) as trace:
        for _ in range(num_steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    spans = [(e.time_range.start, e.time_range.end) for e in trace.events() if e.device_type == wanted]
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    rows = [(e.key, e.device_type == wanted, e.device_type == DeviceType.CPU, getattr(e, key))
            for e in trace.key_averages()]  # fmt: skip
    launches = len(spans) // num_steps if device == "cuda" else 0
    return Profile(busy_ms(spans) / num_steps, shares_of(rows, words), launches)


def shares_of(rows: Sequence[tuple[str, bool, bool, float]], words: dict[str, tuple[str, ...]]) -> dict[str, float]:
    """rows: (name, whether it ran on the timed device, whether it is an operator, its own time there).

    The whole is what ran on the device; an operator's own time is that of the kernels which it launched.
    """
    whole = sum(own for _, on_device, _, own in rows if on_device)
    return {
        share: sum(own for name, _, is_op, own in rows if is_op and any(part in name for part in parts)) / whole
        for share, parts in words.items()
        if whole > 0
    }


def machine(device: str) -> dict[str, Any]:
    """What a row says about where it was measured."""
    root = Path(__file__).resolve().parents[1]
    asked = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "unknown"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {torch.get_num_threads()} thread"
    return {"device": name, "torch": torch.__version__, "commit": commit}


def has_bf16_units() -> bool:
    """Whether this CPU multiplies in bf16; says so where it does not, as then only fp32 is worth measuring."""
    found = any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))
    if not found:
        print("this CPU has no bf16 units (AMX, AVX512_BF16): fp32 alone is measured unless bf16 is asked for")
    return found


def processor() -> str:
    """The processor's name, its widest vectors and its bf16 units, from /proc/cpuinfo where there is one."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in fields.items()}
    flags = found.get("flags", "").split()
    vectors = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    units = [name for name, flag in (("AMX", "amx_bf16"), ("AVX512_BF16", "avx512_bf16")) if flag in flags]
    return f"{found.get('model name', platform.machine())} ({', '.join([vectors, *units])})"
