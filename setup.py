"""Installs two packages, sfd_fast and sfd_kernels; kernels/cpu_build.py builds the C++ operators of the second.

`pip install ./kernels` installs sfd_kernels alone.
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "kernels"))  # an isolated build has no path of its own

from cpu_build import kernel_options  # noqa: E402

setup(
    packages=[*find_packages(".", include=["sfd_fast*"]), *find_packages("kernels", include=["sfd_kernels*"])],
    package_dir={"sfd_kernels": "kernels/sfd_kernels"},
    package_data={"sfd_kernels": ["cpu/*.cpp", "cpu/*.h", "py.typed"], "sfd_fast": ["py.typed", "formats/*.txt"]},
    **kernel_options(),
)
