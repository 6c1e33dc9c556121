"""Installs sfd_kernels alone; cpu_build.py builds its C++ operators."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).resolve().parent))  # an isolated build has no path of its own

from cpu_build import kernel_options  # noqa: E402

setup(
    packages=find_packages(".", include=["sfd_kernels*"]),
    package_data={"sfd_kernels": ["cpu/*.cpp", "cpu/*.h", "py.typed"]},
    **kernel_options(),
)
