"""Counts the bytes that launches really load and store, in a process of its own.

The operator's launch function runs on CPU tensors of the full shape; each of its launches is then executed by Triton's
interpreter, program by program, and every access that its mask lets through is counted: re-reads by other programs and
partial sums included, caches ignored. Of large grids a sample of the programs runs and the count is scaled.

TRITON_INTERPRET=1 must be set before Triton is imported, hence the process; `count` starts it. Protocol: a JSON list of
{"operator", "mode", "size", "batch"} on standard input, the list of results on standard output.
"""

import inspect
import json
import os
import subprocess
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfd_kernels.offline.examples import MODES, SIZES, Make, Mode
from sfd_kernels.registry import OPS, Op

LARGE_ELEMENTS = 1 << 16


class ZeroMake(Make):
    """As Make, but tensors of many elements are zeros, which cost neither time nor memory until they are touched.

    What steers a kernel, coefficients and flags, keeps its values.
    """

    def __init__(self, mode: Mode) -> None:
        super().__init__(mode, "cpu")

    def _draw(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if torch.Size(shape).numel() > LARGE_ELEMENTS:
            return torch.zeros(shape, dtype=dtype)
        return super()._draw(shape, dtype)


def sampled_programs(num_programs: int) -> range:
    """All of up to 64 programs, else every 17th, of large grids about 32.

    The step is a prime above 16, and no split of a sample's rows is a multiple of it: every split is met equally often.
    """
    if num_programs <= 64:
        return range(num_programs)
    step = max(17, num_programs // 32)
    while any(step % divisor == 0 for divisor in range(2, int(step**0.5) + 1)):
        step += 1
    return range(0, num_programs, step)


def count(specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Traffic of each spec, counted in a new process; see `_count_one` for what a result holds."""
    package = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "sfd_kernels.offline.traffic"]
    done = subprocess.run(command, input=json.dumps(specs), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"counting bytes in the interpreter failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def _count_one(operator: str, mode: str, size: str, batch: int) -> dict[str, Any]:
    """{"least_bytes", "flops", "shape", "launches": [{"kernel", "programs", "interpreted", "loaded", "stored"}]}.

    loaded and stored: bytes by parameter name, scaled to all programs.
    """
    op = OPS[operator]
    _, args = next(op._examples(ZeroMake(MODES[mode]), SIZES[size].with_batch(batch)))
    launches = _record(op, args)
    return {
        "shape": _shape(args),
        "least_bytes": op.bytes(*args),
        "flops": op.flops(*args),
        "launches": [_traffic(*launch) for launch in launches],
    }


def _shape(args: tuple) -> list[int]:
    """Shape of the largest tensor argument; of a list of tensors (how many, elements in all)."""
    if isinstance(args[0], (list, tuple)):
        return [len(args[0]), sum(tensor.numel() for tensor in args[0])]
    return list(max((arg for arg in args if isinstance(arg, Tensor)), key=Tensor.numel).shape)


def _record(op: Op, args: tuple) -> list[tuple]:
    """(kernel, number of programs, args, meta) of each launch; none runs."""
    from triton.runtime.interpreter import InterpretedFunction

    launches: list[tuple] = []

    def run(kernel: Any, *args: Any, grid: tuple, warmup: bool, **meta: Any) -> None:
        launches.append((kernel, grid[0], args, meta))

    original, InterpretedFunction.run = InterpretedFunction.run, run
    try:
        op.load_triton()(*args)
    finally:
        InterpretedFunction.run = original
    return launches


def _traffic(kernel: Any, num_programs: int, args: tuple, meta: dict[str, Any]) -> dict[str, Any]:
    programs = sampled_programs(num_programs)
    counts = execute(kernel, args, meta, num_programs, programs)
    scale = num_programs / len(programs)
    return {
        "kernel": kernel.__name__.lstrip("_"),
        "programs": num_programs,
        "interpreted": len(programs),
        **{kind: {name: round(number * scale) for name, number in counts[kind].items()} for kind in counts},
    }


def execute(kernel: Any, args: tuple, meta: dict[str, Any], num_programs: int, programs: range) -> dict[str, Counter]:
    """Runs some programs of a launch in the interpreter and counts bytes by kind ("loaded", "stored") and parameter."""
    from triton.runtime.interpreter import GridExecutor, _implicit_cvt, _patch_lang, interpreter_builder

    function = kernel.rewrite()
    constexprs = GridExecutor(function, kernel.arg_names, (num_programs,)).constexprs
    meta = {name: value for name, value in meta.items() if name in kernel.arg_names}
    values = inspect.getcallargs(function, *args, **meta)
    counter = _Counter(values)
    scope = _patch_lang(function)
    try:
        counter.attach(interpreter_builder)
        values = {name: value if name in constexprs else _implicit_cvt(value) for name, value in values.items()}
        interpreter_builder.set_grid_dim(num_programs, 1, 1)
        for program in programs:
            interpreter_builder.set_grid_idx(program, 0, 0)
            function(**values)
    finally:
        counter.detach(interpreter_builder)
        scope.restore()
    return counter.counts


class _Counter:
    """Stands before the interpreter's masked load and store and counts what passes."""

    METHODS = {"create_masked_load": "loaded", "create_masked_store": "stored"}

    def __init__(self, values: dict[str, Any]) -> None:
        self.counts: dict[str, Counter] = {"loaded": Counter(), "stored": Counter()}
        named = [pair for name, value in values.items() for pair in _tensors(name, value)]
        ranges = sorted((tensor.data_ptr(), label) for label, tensor in named)
        self._starts = [start for start, _ in ranges]
        self._labels = [label for _, label in ranges]

    def attach(self, builder: Any) -> None:
        for method, kind in self.METHODS.items():
            setattr(builder, method, self._wrapped(getattr(builder, method), kind))

    def detach(self, builder: Any) -> None:
        for method in self.METHODS:
            builder.__dict__.pop(method, None)

    def _wrapped(self, original: Any, kind: str) -> Any:
        def access(pointers: Any, *rest: Any) -> Any:
            # load (pointers, mask, ...), store (pointers, value, mask, ...)
            mask = (rest[0] if kind == "loaded" else rest[1]).data
            number = int(mask.sum())
            if number:
                address = int(pointers.data.ravel()[mask.ravel().argmax()])
                label = self._labels[bisect_right(self._starts, address) - 1]
                self.counts[kind][label] += number * max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
            return original(pointers, *rest)

        return access


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _tensors(f"{name}[{index}]", item)


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump([_count_one(**spec) for spec in json.load(sys.stdin)], sys.stdout)
