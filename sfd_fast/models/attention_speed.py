"""Which attention library is the fastest: each measured once for a shape, dtype and device; the answer kept on disk.

Letters as in attention.py: B batch, N tokens, H heads, d head_dim.
"""

import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sfd_fast.files.atomic import write_atomically
from sfd_fast.files.messages import first_line

WARM_UPS, WINDOWS, CALLS = 3, 5, 5
QUEUEING = 4_000_000  # cycles, about 2 ms: longer than the host takes to launch a window
log = logging.getLogger("sfd_fast.attention")

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def kept_answers() -> Path:
    """The file of the answers: attention.json in $XDG_CACHE_HOME/sfd_fast, or else in ~/.cache/sfd_fast."""
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder).expanduser() / "sfd_fast" / "attention.json"


def measure(
    calls: Mapping[str, Call],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    training: bool,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """{name: milliseconds} of one call, and its backward pass in training, on random q, k, v of that shape.

    The median of WINDOWS windows of CALLS calls each. A library that raises an error is left out, and that is said.
    """
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=training) for _ in range(3))
    upstream = torch.randn_like(q)
    found = {}
    for name, call in calls.items():

        def once() -> None:
            with torch.set_grad_enabled(training):
                out = call(q, k, v)  # noqa: B023
            if training:
                torch.autograd.grad(out, (q, k, v), upstream)

        try:
            found[name] = _milliseconds(once, device, clock)
        except (RuntimeError, ImportError, OSError, ValueError) as error:  # built for another device or torch
            log.warning("attention: '%s' does not run here and is passed over: %s", name, first_line(error))
    return found


def _milliseconds(once: Callable[[], None], device: torch.device, clock: Callable[[], float]) -> float:
    for _ in range(WARM_UPS):
        once()
    window = _device_window if device.type == "cuda" else _host_window
    return statistics.median(window(once, clock) / CALLS for _ in range(WINDOWS))


def _host_window(once: Callable[[], None], clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(CALLS):
        once()
    return (clock() - start) * 1e3


def _device_window(once: Callable[[], None], clock: Callable[[], float]) -> float:
    """Device time: the calls are queued while the device waits, so that the host's launches are not timed."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(QUEUEING)
    start.record()
    for _ in range(CALLS):
        once()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def fastest(
    calls: Mapping[str, Call],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    training: bool,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> str:
    """The name of the fastest call, from the file of answers or measured and written there.

    Between two machines of one model the answer may differ, and so the last bits of results; a named library does not.
    An answer holds for the device's model, torch's version, the shape, dtype, direction and the set of names. Delete
    the file to measure again. Where it cannot be written the answer holds for this process.
    """
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    direction = "forward and backward" if training else "forward"
    dims, kind = "x".join(map(str, shape)), str(dtype).removeprefix("torch.")
    key = f"{model}, torch {torch.__version__}, {dims} {kind}, {direction}, of {' '.join(sorted(calls))}"
    path = kept_answers()
    answer = _read(path).get(key)
    if answer in calls:
        return answer
    times = measure(calls, shape, dtype, device, training, clock=clock)
    if not times:
        raise RuntimeError(f"no attention library runs {dims} {kind} on {model}; the lines above say why")
    answer = min(times, key=times.__getitem__)
    log.info("attention: %s", ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items()))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_read(path) | {key: answer}, indent=1) + "\n"
        write_atomically(path, text)
    except OSError as error:
        log.warning("attention: the measured choice is not kept, as %s cannot be written (%s)", path, error)
    return answer


def _read(path: Path) -> dict[str, str]:
    try:
        kept = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("attention: %s is not readable (%s); libraries are measured again", path, first_line(error))
        return {}
    return kept if isinstance(kept, dict) else {}
