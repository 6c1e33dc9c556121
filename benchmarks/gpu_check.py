"""One command for a machine with a GPU: what runs there, whether it is right, and how fast it is. Under nine minutes.

    PYTHONPATH=.:kernels python benchmarks/gpu_check.py [--json F] [--parts facts accuracy ...]
    PYTHONPATH=.:kernels python benchmarks/gpu_check.py --rehearse        # on a CPU, tiny, no number claimed

Needs torch, triton and numpy, and no network; nothing is installed. Wheels that benchmarks/gpu_wheels.py gathered are
used where they lie. Every part runs in a process of its own and is ended when its time is over; the JSON is written
anew after each. A part that fails is reported, the others run; the command then ends with 1.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WHEELS = Path(__file__).resolve().parent / "wheels"
PARTS = {"facts": 20, "accuracy": 60, "kernels": 180, "sampler": 90, "training": 170}
"""seconds of each part, its start and imports included; together 520"""
MARGIN_S = 6.0
"""a part stops starting things so long before it would be ended"""


def environment(folder: Path, part: str, rehearse: bool) -> dict[str, str]:
    """A part's variables: the sources here, the wheels unpacked, and no cache of a user's that a rehearsal touches."""
    places = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), *unpacked(folder / "wheels")]
    made = os.environ | {"PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])}
    made["PYTHONUNBUFFERED"] = "1"
    if rehearse:
        made |= {"CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(folder)}
        if part == "accuracy" and not importlib.import_module("gpu_accuracy").interpreter_problem():
            made["TRITON_INTERPRET"] = "1"
    return made


def unpacked(folder: Path) -> list[str]:
    """The folder with the gathered wheels in it, where there are any: pure Python needs no installation."""
    wheels = sorted(WHEELS.glob("*.whl"))
    if wheels and not folder.exists():
        for wheel in wheels:
            zipfile.ZipFile(wheel).extractall(folder)
    return [str(folder)] if wheels else []


def run_in_process(part: str, folder: Path, seconds: float, rehearse: bool) -> dict[str, Any]:
    """{"status", "seconds", "rows", "output"} of a part; the rows written before an end by force count."""
    rows = folder / f"{part}.json"
    command = [sys.executable, __file__, "--part", part, "--rows", str(rows), "--seconds", str(seconds)]
    command += ["--rehearse"] if rehearse else []
    start, output = time.monotonic(), folder / f"{part}.log"
    with output.open("w") as log:
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment(folder, part, rehearse),
            start_new_session=True,
        )  # fmt: skip
        try:
            code = child.wait(seconds)
            status = "done" if code == 0 else f"failed: ended with {code}"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)  # its own session: its workers end with it
            child.wait()
            status = f"failed: not ready after {seconds:.0f} s"
    found = json.loads(rows.read_text()) if rows.exists() else []
    if status == "done" and any(row.get("holds") is False for row in found):
        status = "failed: a row does not hold"
    said = output.read_text(errors="replace").splitlines()
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "rows": found, "output": said[-30:]}


def work(part: str, rows: Path, seconds: float, rehearse: bool) -> None:
    """A part's own process."""
    from gpu_part import Part

    importlib.import_module(f"gpu_{part}").run_part(Part(rows, seconds - MARGIN_S, rehearse=rehearse))


def check(parts: list[str], target: Path, *, rehearse: bool, scale: float = 1.0) -> dict[str, Any]:
    """Runs the parts and writes the JSON after each: {"rehearsal", "parts": {name: run_in_process}}."""
    found: dict[str, Any] = {"rehearsal": rehearse, "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            found["parts"][part] = run_in_process(part, Path(folder), PARTS[part] * scale, rehearse)
            fresh = target.with_name(target.name + ".writing")
            fresh.write_text(json.dumps(found, indent=1) + "\n")
            os.replace(fresh, target)
            show(part, found["parts"][part])
    return found


def show(part: str, result: dict[str, Any]) -> None:
    print(f"{part}: {result['status']} ({result['seconds']:.0f} s)")
    for row in result["rows"]:
        value = f"{row['value']:.4g}" if isinstance(row["value"], float) else row["value"] or ""
        holds = {True: "holds", False: "DOES NOT HOLD", None: ""}[row.get("holds")]
        print(f"  {row['name']:<72.72}{value!s:>14} {row['unit']:<9}{holds} {row.get('note', '')}".rstrip())
    if result["status"] != "done":
        print(*[f"  | {line}" for line in result["output"]], sep="\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="result; rewritten after each part")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rehearse", action="store_true", help="everything once on a CPU at tiny sizes, no number")
    parser.add_argument("--time-scale", type=float, default=1.0, help="multiplies the seconds of every part")
    parser.add_argument("--unpack", type=Path, metavar="DIR", help="only unpack the gathered wheels there")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.unpack:
        print(*unpacked(options.unpack))
        return 0
    if options.part:
        work(options.part, options.rows, options.seconds, options.rehearse)
        return 0
    if not options.rehearse:
        import torch

        if not torch.cuda.is_available():
            print("torch sees no CUDA device here; --rehearse runs every part on the CPU", file=sys.stderr)
            return 2
    found = check(options.parts, options.json, rehearse=options.rehearse, scale=options.time_scale)
    print(f"written: {options.json}")
    return int(any(result["status"] != "done" for result in found["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
