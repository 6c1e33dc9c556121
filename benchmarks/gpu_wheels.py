"""Gathers the pure-Python packages that a bare GPU machine may lack into benchmarks/wheels (8 MB, ignored by git).

    python benchmarks/gpu_wheels.py            # where there is a network

gpu_check.py uses what lies there; the tests need it on PYTHONPATH (benchmarks/README.md).
"""

import subprocess
import sys
from pathlib import Path

WHEELS = Path(__file__).resolve().parent / "wheels"
PACKAGES = (
    "omegaconf", "importlib-metadata<9", "zipp", "liger-kernel", "diffusers", "torchdiffeq==0.2.5",
)  # fmt: skip
"""importlib-metadata from 9 on needs a further package"""


def main() -> int:
    target = ["--no-deps", "--only-binary=:all:", "--implementation", "py", "--abi", "none", "--platform", "any"]
    WHEELS.mkdir(exist_ok=True)
    for old in WHEELS.glob("*.whl"):  # two versions of one package must not meet
        old.unlink()
    done = subprocess.run([sys.executable, "-m", "pip", "download", "-q", *target, "-d", str(WHEELS), *PACKAGES])
    for wheel in sorted(WHEELS.glob("*.whl")):
        print(f"{wheel.stat().st_size / 2**20:6.2f} MB  {wheel.name}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
