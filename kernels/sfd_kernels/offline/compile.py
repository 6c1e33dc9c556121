"""Compiles, with no GPU, the launches that the operators really make, and reads what the machine code needs.

The operator's own Python launch function runs on fake CUDA tensors (which also shows that it never waits for the
device: reading a value of one is an error); each kernel launch is recorded instead of started, then compiled for an
architecture by the same path that a launch takes (JITFunction.run), under a driver that only names the architecture. So
the cubin has the launch's own dtypes, alignments, integer specialisations, tile sizes and warps.
"""

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

try:
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
except ModuleNotFoundError as error:
    raise ImportError(
        "the offline report compiles Triton kernels; install it with: pip install 'triton>=3.6'"
    ) from error

from sfd_kernels.offline.examples import MODES, SIZES, Make
from sfd_kernels.registry import INTERPRET, Op

BATCH = 32
"""samples of 256 tokens: 8192 tokens, enough to fill a GPU"""

LARGE_BYTES = 512 * 1024
"""A tensor from this size on is large and must be carried by 128-bit accesses. Below: weights, modulation, losses."""


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA programming guide, technical specifications per compute capability)."""

    shared_bytes: int
    warps: int = 64
    programs: int = 32
    registers: int = 65536


MULTIPROCESSORS = {80: Multiprocessor(164 * 1024), 90: Multiprocessor(228 * 1024), 100: Multiprocessor(228 * 1024)}


class _Architecture:
    """Stand-in for a CUDA driver: names the architecture to compile for; compiled kernels are kept per architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class _NoDevice(_Architecture):
    """The driver while launches are recorded: the fake tensors are on device 0."""

    def get_current_device(self) -> int:
        return 0


@contextlib.contextmanager
def _active(stand_in: _Architecture) -> Iterator[None]:
    before = driver._active
    driver.set_active(stand_in)
    try:
        yield
    finally:
        driver._active = before


class Pointer:
    """A tensor as Triton's argument specialisation sees it: dtype, and an address aligned as its storage offset is."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self.num_bytes = tensor.numel() * tensor.element_size()
        self.address = 4096 + tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        return self.num_bytes


def _pointers(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return Pointer(arg)
    return tuple(map(_pointers, arg)) if isinstance(arg, tuple) else arg


@dataclass(frozen=True)
class Launch:
    """One kernel launch as an operator's launch function made it."""

    kernel: JITFunction
    num_programs: int
    args: tuple
    meta: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__.lstrip("_")

    @cached_property
    def tensor_bytes(self) -> dict[str, int]:
        """Bytes of every tensor argument by its parameter's name (`params[3]` in a tuple)."""
        sizes = {}
        for name, arg in zip(self.kernel.arg_names, self.args):
            for label, value in _flatten(name, arg):
                if isinstance(value, Pointer):
                    sizes[label] = value.num_bytes
        return sizes

    def compile(self, arch: int) -> "Compiled":
        """The cubin of this launch for sm_<arch>, made by the wheel's ptxas."""
        with _active(_Architecture(arch)):
            kernel = self.kernel.run(*self.args, grid=(self.num_programs,), warmup=True, **self.meta)
        return Compiled(self, arch, kernel)


def _flatten(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _flatten(f"{name}[{index}]", item)
    else:
        yield name, value


def example(op: Op, mode: str, size: str, batch: int = BATCH) -> tuple[str, tuple]:
    """The example that is measured (the first), on fake CUDA tensors; call it inside a FakeTensorMode."""
    label, args = next(op._examples(Make(MODES[mode], "cpu"), SIZES[size].with_batch(batch)))
    return label, _on_cuda(args)


def _on_cuda(value: Any) -> Any:
    """Fake CPU tensors as fake CUDA tensors with the same strides and storage offset."""
    if isinstance(value, Tensor):
        num_elements = value.untyped_storage().nbytes() // value.element_size()
        storage = torch.empty(num_elements, dtype=value.dtype, device="cuda:0")
        return storage.as_strided(value.shape, value.stride(), value.storage_offset())
    return type(value)(map(_on_cuda, value)) if isinstance(value, (tuple, list)) else value


def record(op: Op, args: tuple) -> list[Launch]:
    """The launches that op makes for these (fake CUDA) arguments; none where the reference serves.

    ValueError under TRITON_INTERPRET=1: the interpreter compiles nothing.
    """
    if INTERPRET:
        raise ValueError("TRITON_INTERPRET=1 is set, and the interpreter cannot compile; unset it")
    function = op.load_triton()
    if function is None:
        return []
    launches: list[Launch] = []

    def run(kernel: JITFunction, *args: Any, grid: tuple, warmup: bool, **meta: Any) -> None:
        launches.append(Launch(kernel, grid[0], _pointers(args), meta))

    original, JITFunction.run = JITFunction.run, run
    try:
        with _active(_NoDevice(0)):
            function(*args)
    finally:
        JITFunction.run = original
    return launches


def launches_of(op: Op, mode: str, size: str, batch: int = BATCH) -> list[Launch]:
    """What op launches for its first example: for instance XL at 8192 tokens in the autocast mix."""
    with FakeTensorMode():
        return record(op, example(op, mode, size, batch)[1])


@dataclass(frozen=True)
class Compiled:
    """A compiled launch and what its PTX, cubin and layouts show."""

    launch: Launch
    arch: int
    kernel: Any

    @property
    def cubin(self) -> bytes:
        return self.kernel.asm["cubin"]

    @property
    def layout_conversions(self) -> int:
        """Times a value changes its distribution over threads, through shared memory or shuffles."""
        return self.kernel.asm["ttgir"].count("ttg.convert_layout ")

    @property
    def num_warps(self) -> int:
        return self.kernel.metadata.num_warps

    @property
    def shared_bytes(self) -> int:
        return self.kernel.metadata.shared

    @cached_property
    def registers(self) -> int:
        return self._resources["REG"]

    @cached_property
    def stack_bytes(self) -> int:
        """Local memory of a thread: spilled registers, and arrays such as those of sine's reduction of large angles."""
        return max(self._resources["STACK"], self._resources["LOCAL"])

    @cached_property
    def spill_bytes(self) -> int:
        """Bytes that a thread spills and reloads, as ptxas itself says; only asked where there is a stack at all."""
        if self.stack_bytes == 0:
            return 0
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "kernel.ptx")
            with open(source, "w") as file:
                file.write(self.kernel.asm["ptx"])
            ptxas = (knobs.nvidia.ptxas_blackwell if self.arch >= 100 else knobs.nvidia.ptxas).path
            target = f"sm_{self.arch}" + ("a" if self.arch >= 90 else "")
            command = [ptxas, "-v", "--regAllocOptLevel=2", f"--gpu-name={target}", source, "-o", f"{source}.cubin"]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        return sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said)))

    @property
    def programs_per_multiprocessor(self) -> int:
        """How many programs fit on one by registers (given out in units of 256 for a warp), shared memory and warps."""
        limits = MULTIPROCESSORS[self.arch]
        registers_of_warp = -(-self.registers * 32 // 256) * 256
        by_registers = limits.registers // registers_of_warp // self.num_warps
        by_shared = limits.shared_bytes // (self.shared_bytes + 1024)  # the runtime keeps 1 KB of each program
        return min(by_registers, by_shared, limits.warps // self.num_warps, limits.programs)

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's warps that can be resident."""
        return self.programs_per_multiprocessor * self.num_warps / MULTIPROCESSORS[self.arch].warps

    @cached_property
    def accesses(self) -> dict[str, list[int]]:
        """Width in bits of every global load, asynchronous copy and store, by the tensor parameter that it goes to."""
        widths: dict[str, list[int]] = {}
        for register, bits in _global_accesses(self.kernel.asm["ptx"]):
            for parameter in self._origins.get(register, ()):
                widths.setdefault(parameter, []).append(bits)
        return widths

    @cached_property
    def large_access_bits(self) -> dict[str, int]:
        """The narrowest access to every large tensor that the kernel touches."""
        sizes = self.launch.tensor_bytes
        return {name: min(bits) for name, bits in self.accesses.items() if sizes[name] >= LARGE_BYTES}

    @cached_property
    def _origins(self) -> dict[str, frozenset[str]]:
        """For every 64-bit PTX register the kernel parameters that it may be an address in."""
        names = [
            label
            for name, kind in self.kernel.src.signature.items()
            for label, type_ in _flatten(name, kind)
            if type_ != "constexpr"
        ]
        ptx = self.kernel.asm["ptx"]
        origins: dict[str, frozenset[str]] = {}
        # A parameter is loaded by name, or its address is taken and selected first (many tensors in one launch).
        for register, index in re.findall(r"(?:ld\.param|mov)\.[bu]64\s+(%rd\d+), \[?\w+_param_(\d+)\]?;", ptx):
            if int(index) < len(names) and names[int(index)] in self.launch.tensor_bytes:
                origins[register] = frozenset([names[int(index)]])
        moves = []
        for line in ptx.splitlines():
            found = re.match(rf"\s*(?:@!?%p\d+\s+)?(?:{_ADDRESS_ARITHMETIC})[\w.]*\s+(%rd\d+), (.*);", line)
            if found:
                moves.append((found[1], re.findall(r"%rd\d+", found[2])))
        changed = True
        while changed:
            changed = False
            for target, sources in moves:
                merged = frozenset().union(origins.get(target, ()), *(origins.get(source, ()) for source in sources))
                if merged != origins.get(target, frozenset()):
                    origins[target], changed = merged, True
        return origins

    @cached_property
    def _resources(self) -> dict[str, int]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}


_ADDRESS_ARITHMETIC = r"add|sub|mad|mov|selp|cvta|or|and|shl|ld\.param"
_COPY = re.compile(r"cp\.async\.\w+\.shared\.global\S*\s+\[[^\]]*\], \[ ?(%rd\d+)[^\]]*\], (0x[0-9a-f]+|\d+)")
_ACCESS = re.compile(r"\b(?:ld|st)\.global\S*?((?:\.v[248])?)\.[busf](\d+)\s.*?\[ ?(%rd\d+)")


def _global_accesses(ptx: str) -> Iterator[tuple[str, int]]:
    """(address register, bits) of every access to global memory in the PTX."""
    for line in ptx.splitlines():
        if copy := _COPY.search(line):
            yield copy[1], 8 * int(copy[2], 0)
        if access := _ACCESS.search(line):
            yield access[3], int(access[2]) * int(access[1][2:] or 1)
