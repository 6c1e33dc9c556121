"""Builds the C++ operators of sfd_kernels where a compiler allows; both setup.py files use it.

The build is optional: without it the install succeeds, every CPU operator runs as its plain PyTorch reference, and
sfd_kernels/build_error.txt holds what the build said (`sfd doctor` prints it). SFD_KERNELS_BUILD=0 skips the build,
SFD_KERNELS_BUILD=require makes its failure the install's.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
LIBRARY = "_cpu"
ERROR_FILE = "build_error.txt"


class BuildError(Exception):
    """The build stopped; the text says why."""


def run(command: list[str]) -> None:
    """Runs a command; BuildError with everything it printed where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}")


def program(name: str) -> str | None:
    """A program beside the running Python (pip puts cmake and ninja there) or on PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def compile_library(build: Path, destination: Path) -> None:
    """CMake's configure and build; the library is copied to the folder destination."""
    torch = importlib.util.find_spec("torch")
    if torch is None:
        raise BuildError("torch is not importable while building: install it, then `pip install --no-build-isolation`")
    cmake = program("cmake")
    if cmake is None:
        raise BuildError("cmake is not installed: `pip install cmake ninja`")
    build.mkdir(parents=True, exist_ok=True)
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    ninja = program("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    torch_dir = Path(torch.origin).parent
    run([cmake, "-S", str(HERE), "-B", str(build), f"-DTORCH_DIR={torch_dir}", *generator])
    run([cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)])
    built = [path for path in build.glob(f"{LIBRARY}.*") if path.suffix in (".so", ".dylib")]
    destination.mkdir(parents=True, exist_ok=True)
    # A new file in place of the old one: a process that has the old library mapped keeps it intact.
    temporary = destination / f"{built[0].name}.new"
    shutil.copyfile(built[0], temporary)
    temporary.replace(destination / built[0].name)


class BuildOptional(build_ext):
    """build_ext for the one CMake extension; a failure is stored and warned about, not raised."""

    def run(self) -> None:
        for extension in self.extensions:
            self.build_extension(extension)

    def build_extension(self, ext: Extension) -> None:
        packages = HERE if self.inplace else Path(self.build_lib).resolve()
        destination = packages / "sfd_kernels"
        error_file = destination / ERROR_FILE
        mode = os.environ.get("SFD_KERNELS_BUILD", "1")
        try:
            if mode == "0":
                raise BuildError("not built: SFD_KERNELS_BUILD=0 was set when installing")
            compile_library(Path(self.build_temp).resolve() / "cpu", destination)
            error_file.unlink(missing_ok=True)
        except BuildError as error:
            if mode == "require":
                raise
            destination.mkdir(parents=True, exist_ok=True)
            for stale in (*destination.glob(f"{LIBRARY}*.so"), *destination.glob(f"{LIBRARY}*.dylib")):
                stale.unlink()
            error_file.write_text(f"{error}\n")
            self.warn(f"no C++ operators: CPU operators run as plain PyTorch. Reason (in {error_file}):\n{error}")

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "sfd_kernels"
        return [str(path) for path in (*folder.glob(f"{LIBRARY}*"), *folder.glob(ERROR_FILE))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """The library links to torch, not to Python: one wheel serves every Python 3 of a platform, and every platform
    where the library is not in it."""

    def get_tag(self) -> tuple[str, str, str]:
        folder = Path(self.get_finalized_command("build").build_lib, "sfd_kernels")
        self.root_is_pure = not any(folder.glob(f"{LIBRARY}.*"))
        return "py3", "none", "any" if self.root_is_pure else super().get_tag()[2]


def kernel_options() -> dict:
    """What setup() needs to build and pack sfd_kernels."""
    return {
        "ext_modules": [Extension(f"sfd_kernels.{LIBRARY}", sources=[])],
        "cmdclass": {"build_ext": BuildOptional, "bdist_wheel": PlatformWheel},
    }
