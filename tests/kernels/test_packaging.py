"""sfd_kernels by itself, and what both packages promise to whoever builds on them: versions, wheels, types."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import sfd_kernels

import sfd_fast

ROOT = Path(__file__).resolve().parents[2]
OTHERS = (
    "torch", "numpy", "PIL", "scipy", "sklearn", "diffusers", "transformers", "huggingface_hub", "safetensors",
    "triton", "torchdiffeq", "yaml", "omegaconf", "fsspec", "tqdm",
)  # fmt: skip
"""packages that mypy does not read here: torch alone takes it minutes"""
PUBLIC = {"sfd_kernels": sfd_kernels.__all__, "sfd_fast": sfd_fast.__all__}


def wheel(source: Path, tmp_path: Path) -> Path:
    """A wheel of the sources in a folder, without the C++ part."""
    copy = tmp_path / "source"
    made = ("*.so", "*.dylib", "__pycache__", "build_error.txt", "build", "*.egg-info", ".*", "runs")
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(*made))
    command = "-m pip wheel -q --no-deps --no-build-isolation -w".split()  # noqa: SIM905
    done = subprocess.run(
        [sys.executable, *command, tmp_path / "dist", copy], env={**os.environ, "SFD_KERNELS_BUILD": "0"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (tmp_path / "dist").glob("*.whl")
    return made


def test_the_kernels_alone_are_a_wheel_that_imports_without_the_repository(tmp_path):
    made = wheel(ROOT / "kernels", tmp_path)
    assert made.name == f"sfd_kernels-{sfd_kernels.__version__}-py3-none-any.whl"  # without C++ it fits every platform
    with zipfile.ZipFile(made) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    assert {"sfd_kernels/py.typed", "sfd_kernels/cpu/library.cpp", "sfd_kernels/triton/swiglu.py"} <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"sfd_kernels"}
    code = (
        "import torch, sfd_kernels; assert 'installed' in sfd_kernels.__file__, sfd_kernels.__file__\n"
        "assert sfd_kernels.swiglu(torch.ones(2, 8)).shape == (2, 4)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_repository_is_a_wheel_of_both_packages(tmp_path):
    made = wheel(ROOT, tmp_path)
    assert made.name == f"sfd_fast-{sfd_fast.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(made) as archive:
        names = set(archive.namelist())
    assert {"sfd_fast/py.typed", "sfd_kernels/py.typed", "sfd_fast/app/page.py", "sfd_kernels/cpu/library.cpp"} <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"sfd_fast", "sfd_kernels"}


def test_both_packages_have_the_version_of_their_pyproject():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.*)"', text, re.M)[1] == sfd_fast.__version__ == sfd_kernels.__version__


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed here")
@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_have_types(package, tmp_path):
    """Whoever checks code against these packages sees every public name with types, none of them Any."""
    lines = [f"from {package} import {name}; reveal_type({name})" for name in PUBLIC[package]]
    (tmp_path / "use.py").write_text("\n".join(lines) + "\n")
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nfollow_imports = silent\n"
        + "".join(f"[mypy-{name}.*]\nfollow_imports = skip\nignore_missing_imports = true\n" for name in OTHERS)
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", tmp_path / "cache", "use.py"],
        cwd=tmp_path, env={**os.environ, "MYPYPATH": f"{ROOT}:{ROOT / 'kernels'}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    revealed = re.findall(r"use.py:(\d+): note: Revealed type is \"(.*)\"", done.stdout)
    assert len(revealed) == len(lines)
    untyped = {lines[int(number) - 1].split()[3].rstrip(";") for number, kind in revealed if kind == "Any"}
    assert untyped <= {"sample"}  # its decorator is torch's, which is not read here
