"""The part `kernels`: XL mix; ours, eager, torch.compile, Liger where it has the operator, and a copy; attention too.

GB/s are the least bytes over the time. Compilation comes last, as it is what may not fit into the time.
"""

from collections.abc import Callable
from typing import Any

import torch
from gpu_part import Part
from kernel_providers import Provider, make_providers
from sfd_kernels.registry import OPS, Op
from timing import Timing

from kernels import copy_of
from sfd_fast.models.attention import measured_backends

BATCH = 32
COMPILE_S = 12.0  # what one operator and its gradient may take in Inductor, cold


def passes(op: Op, args: tuple, size: str, batch: int, device: str) -> dict[str, int]:
    """{pass: least bytes}; both passes together where there is a fused backward."""
    found = {"forward": op.bytes(*args)}
    if op.backward is not None:
        back = next(op.backward.examples("mix", size, batch, device))[1]
        found["both"] = found["forward"] + op.backward.bytes(*back)
    return found


def call_of(provider: Provider, name: str) -> Callable[[], Any]:
    return provider.forward if name == "forward" else provider.both


class Table:
    """Times of one operator's providers, and their rows."""

    def __init__(self, part: Part, op: Op, size: str) -> None:
        self.part, self.op = part, op
        args = next(op.examples("mix", size, BATCH, part.device))[1]
        self.bytes = passes(op, args, size, BATCH, part.device)
        self.providers = make_providers(op, args, part.device, "eager" if part.rehearse else "inductor")
        self.copies: dict[str, Timing] = {}
        self.ours: dict[str, Timing] = {}

    def time(self, name: str) -> None:
        """Rows of provider `name`, copy among them: every pass."""
        for which, size in self.bytes.items():
            call = copy_of(size, self.part.device) if name == "copy" else call_of(self.providers[name], which)
            timing = self.part.device_time(call)
            if name == "copy":
                self.copies[which] = timing
            if name == "ours":
                self.ours[which] = timing
            more = {"gb_per_s": size / timing.median / 1e6}
            if which in self.copies:
                more["share_of_copy"] = self.copies[which].median / timing.median
            if which in self.ours:
                more["time_over_ours"] = timing.median / self.ours[which].median
            self.part.timed(f"{self.op.name} {which}: {name}", timing, **more)


def attention_rows(part: Part, size: str) -> None:
    """Every attention library that is installed and fits, forward and backward, at the shape of the size's blocks."""
    from sfd_kernels.offline.examples import SIZES

    shape = SIZES[size]
    dims = (BATCH if not part.rehearse else 2, shape.tokens, shape.heads, shape.head_dim)
    for name, ms in measured_backends(dims, torch.bfloat16, part.device, training=True).items():
        part.measured(f"attention {'x'.join(map(str, dims))} bf16, forward and backward: {name}", ms, "ms")


def run_part(part: Part) -> None:
    size = "tiny" if part.rehearse else "XL"
    part.attempt("attention", lambda: attention_rows(part, size))
    late: list[Table] = []
    for op in OPS.values():
        if not op.is_backward and not op.on_cuda:
            part.attempt(op.name, lambda: late.append(quick_rows(part, op, size)), seconds=4.0)  # noqa: B023
    for table in late:
        part.attempt(f"{table.op.name}: compile", lambda: table.time("compile"), seconds=COMPILE_S)  # noqa: B023


def quick_rows(part: Part, op: Op, size: str) -> Table:
    """Rows of all but torch.compile; the table keeps the tensors for that."""
    if op.name == "adamw_ema_step" and not part.rehearse:
        size = "B"  # at XL five optimizers side by side would hold 50 GB
    table = Table(part, op, size)
    for name in ("copy", "ours", *(n for n in table.providers if n not in ("ours", "compile"))):
        part.attempt(f"{op.name}: {name}", lambda: table.time(name))  # noqa: B023
    return table
