"""Offline report on the Triton kernels, no GPU needed: `python -m sfd_kernels.offline.report [--json F]`.

For every operator at the sizes of XL, XXL and B with 8192 tokens, in bf16, the autocast mix and fp32, it compiles the
launches that the operator really makes (offline.py), counts the bytes that they really move (traffic.py), and sets both
against what must hold: no spills, large tensors in 128-bit accesses, hardly more bytes than the least possible.

Source of the bandwidth: 3.0 TB/s, a copy measured on an H100 of 3.35 TB/s; A100 (2.04) and B200 (8.0) at the same 90 %
share of their data sheets. A predicted time is bytes / bandwidth: what the memory needs, without launch and latency.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sfd_kernels.offline.compile import BATCH, MULTIPROCESSORS, Compiled, launches_of
from sfd_kernels.offline.traffic import count
from sfd_kernels.registry import OPS, Op

MODES = ("bf16", "mix", "fp32")
SIZES = ("XL", "XXL", "B")
BANDWIDTH_TB_S = {80: 1.83, 90: 3.0, 100: 7.2}

BYTES_BOUND = 1.05
"""moved bytes over the least possible: inputs once, outputs once"""
REDUCING_BOUND = {
    "rms_norm_modulate_backward": 1.10,
    "gated_residual_norm_modulate_backward": 1.10,
    "qk_norm_rope_backward": 1.10,
}
"""backwards that reduce over tokens: their partial sums are stored and read once more"""

ACCESS_BITS = 128
EXCEPTIONS: dict[tuple[str, str, str], str] = {}
"""(operator, kernel, tensor) that may be carried in narrower accesses, and why; none is needed at these sizes"""


def rows(
    operators: Iterable[str] | None = None,
    archs: Iterable[int] = tuple(MULTIPROCESSORS),
    modes: Iterable[str] = MODES,
    sizes: Iterable[str] = SIZES,
    batch: int = BATCH,
    dump: Path | None = None,
) -> list[dict[str, Any]]:
    """One row for each kernel launch of each operator, architecture, dtype mode and size.

    dump: folder that keeps the cubins. ValueError for an unknown operator or architecture, or an operator for CPU
    tensors alone.
    """
    archs = tuple(archs)
    names = [name for name in OPS if OPS[name].load_triton() is not None] if operators is None else list(operators)
    for given, known, what in ((names, OPS, "operator"), (archs, MULTIPROCESSORS, "architecture")):
        unknown = [str(item) for item in given if item not in known]
        if unknown:
            raise ValueError(f"unknown {what} {', '.join(unknown)}; known: {', '.join(map(str, known))}")
    for name in names:
        if OPS[name].on_cuda:
            raise ValueError(f"{name} has no Triton kernel: {OPS[name].on_cuda}")
    cases = [(name, mode, size) for name in names for mode in modes for size in sizes]
    traffic = count([{"operator": name, "mode": mode, "size": size, "batch": batch} for name, mode, size in cases])
    found = []
    for (name, mode, size), moved in zip(cases, traffic):
        launches = launches_of(OPS[name], mode, size, batch)
        if [launch.name for launch in launches] != [launch["kernel"] for launch in moved["launches"]]:
            raise AssertionError(f"{name} launches other kernels in the interpreter than on a GPU")
        for arch in archs:
            for launch, bytes_of in zip(launches, moved["launches"]):
                compiled = launch.compile(arch)
                found.append(_row(OPS[name], mode, size, moved, bytes_of, compiled))
                if dump is not None:
                    dump.mkdir(parents=True, exist_ok=True)
                    (dump / f"{name}.{launch.name}.sm_{arch}.{mode}.{size}.cubin").write_bytes(compiled.cubin)
    return found


def _row(op: Op, mode: str, size: str, moved: dict, bytes_of: dict, compiled: Compiled) -> dict[str, Any]:
    large: dict[str, int] = {}
    for name, bits in compiled.large_access_bits.items():
        large[_list_name(name)] = min(bits, large.get(_list_name(name), bits))
    widest = [max(compiled.accesses[name]) for name in compiled.large_access_bits]
    widest = widest or [max(map(max, compiled.accesses.values()))]
    total = sum(_total(launch) for launch in moved["launches"])
    bandwidth = BANDWIDTH_TB_S[compiled.arch]
    return {
        "operator": op.name,
        "kernel": compiled.launch.name,
        "pass": "update" if op.mutates else "backward" if op.is_backward else "forward",
        "arch": compiled.arch,
        "dtype": mode,
        "size": size,
        "shape": moved["shape"],
        "programs": compiled.launch.num_programs,
        "num_warps": compiled.num_warps,
        "registers": compiled.registers,
        "spills": compiled.spill_bytes,
        "stack_bytes": compiled.stack_bytes,
        "shared_bytes": compiled.shared_bytes,
        "programs_per_multiprocessor": compiled.programs_per_multiprocessor,
        "occupancy": round(compiled.occupancy, 4),
        "widest_access_bits": min(widest),
        "large_tensor_bits": large,
        "layout_conversions": compiled.layout_conversions,
        "bytes": _total(bytes_of),
        "loaded": _by_argument(bytes_of["loaded"]),
        "stored": _by_argument(bytes_of["stored"]),
        "interpreted_programs": bytes_of["interpreted"],
        "operator_bytes": total,
        "least_bytes": moved["least_bytes"],
        "bytes_over_least": round(total / moved["least_bytes"], 4),
        "intensity_flop_per_byte": round(moved["flops"] / total, 3),
        "bandwidth_tb_s": bandwidth,
        "predicted_us": round(_total(bytes_of) / bandwidth / 1e6, 2),
        "operator_predicted_us": round(total / bandwidth / 1e6, 2),
    }


def _list_name(name: str) -> str:
    """`grads[3]` -> `grads`."""
    return name.split("[")[0]


def _by_argument(bytes_of: dict[str, int]) -> dict[str, int]:
    summed: dict[str, int] = {}
    for name, number in bytes_of.items():
        summed[_list_name(name)] = summed.get(_list_name(name), 0) + number
    return summed


def _total(launch: dict) -> int:
    return sum(launch["loaded"].values()) + sum(launch["stored"].values())


def faults(found: Iterable[dict[str, Any]]) -> list[str]:
    """What must hold and does not, one sentence for each fault; empty where all is well."""
    said = []
    for row in found:
        where = f"{row['operator']} ({row['kernel']}, sm_{row['arch']}, {row['dtype']}, {row['size']})"
        if row["spills"]:
            said.append(f"{where} spills {row['spills']} bytes")
        for tensor, bits in row["large_tensor_bits"].items():
            if bits < ACCESS_BITS and (row["operator"], row["kernel"], tensor) not in EXCEPTIONS:
                said.append(f"{where} carries {tensor} in {bits}-bit accesses")
        bound = REDUCING_BOUND.get(row["operator"], BYTES_BOUND)
        if row["bytes_over_least"] > bound:
            said.append(f"{where} moves {row['bytes_over_least']} of the least bytes, allowed {bound}")
    return said


COLUMNS = {  # column of the printed table: its heading
    "operator": "operator", "kernel": "kernel", "arch": "sm", "dtype": "dtype", "size": "size", "programs": "programs",
    "num_warps": "warps", "registers": "regs", "spills": "spill", "shared_bytes": "shared", "occupancy": "occup",
    "widest_access_bits": "bits", "layout_conversions": "conv", "bytes": "bytes", "bytes_over_least": "over",
    "intensity_flop_per_byte": "flop/B", "predicted_us": "us",
}  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    """Rows as aligned text."""
    lines = [list(COLUMNS.values())] + [[str(row[column]) for column in COLUMNS] for row in found]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Prints the table, writes what was asked for; exit status 1 where something that must hold does not."""
    parser = argparse.ArgumentParser(prog="python -m sfd_kernels.offline.report", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(MULTIPROCESSORS), metavar="SM", help="80, 90, 100")
    parser.add_argument("--operator", nargs="+", default=None, help="only these (default: all)")
    parser.add_argument("--dtype", nargs="+", default=list(MODES), choices=[*MODES, "fp16"])
    parser.add_argument("--size", nargs="+", default=list(SIZES), choices=[*SIZES, "S"])
    parser.add_argument("--batch", type=int, default=BATCH, help="samples of 256 tokens (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows as a JSON list")
    parser.add_argument("--csv", type=Path, help="write the rows as CSV (without what is kept by tensor)")
    parser.add_argument("--dump", type=Path, help="folder for the cubins")
    options = parser.parse_args(argv)
    try:
        found = rows(options.operator, options.arch, options.dtype, options.size, options.batch, options.dump)
    except ValueError as error:
        parser.error(str(error))
    print(table(found))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")
    if options.csv:
        flat = [{key: value for key, value in row.items() if not isinstance(value, (dict, list))} for row in found]
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, flat[0])
            writer.writeheader()
            writer.writerows(flat)
    said = faults(found)
    print(f"{len(found)} kernels; " + ("no faults" if not said else "faults:\n" + "\n".join(said)))
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
