"""Imports run one way, optional packages are imported in one file each, importing does nothing: from syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(ROOT.glob("sfd_fast/**/*.py")) + sorted(ROOT.glob("kernels/sfd_kernels/**/*.py"))

# a module may import from its own layer and from layers above it in this table
LAYERS = [
    ["config", "presets", "recipes", "streams", "pictures", "directory", "released", "memory"],
    ["models", "transport"],
    ["data", "checkpoint", "released_config", "released_semvae", "guidance"],
    ["solvers", "sampler", "adaptive"],
    ["graphs"],
    [
        "evaluation", "pipeline_files", "pipeline", "image_files", "sample_files", "training", "generate", "convert",
        "digits", "doctor",
    ],
    ["demo", "cli", "__main__"],
]  # fmt: skip
ONE_FILE = {
    "deepspeed": {"sfd_fast/training/deepspeed.py"},
    "nvidia": {"sfd_fast/data/dali.py"},
    "flash_attn": {"sfd_fast/models/attention.py"},
    "flash_attn_interface": {"sfd_fast/models/attention.py"},
    "xformers": {"sfd_fast/models/attention.py"},
    "apex": {"sfd_fast/training/optimizer.py"},
}


def imported(tree: ast.AST) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append((node.module, node.lineno))
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def layer(module: str) -> int | None:
    """Number of the layer of "sfd_fast.NAME..."; None for the package itself."""
    parts = module.split(".")
    if len(parts) < 2:
        return None
    for i, names in enumerate(LAYERS):
        if parts[1] in names:
            return i
    return None


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(ROOT / "sfd_fast")], ids=name_of)
def test_imports_run_from_lower_layers_to_higher_ones(path):
    own = layer(name_of(path))
    if path.name == "__init__.py" and path.parent.name == "sfd_fast":
        own = 0
    assert own is not None, f"{path} is in no layer of this test's table"
    for module, line in imported(ast.parse(path.read_text())):
        if module.startswith("sfd_fast."):
            other = layer(module)
            assert other is None or other <= own, f"{path}:{line} imports {module}, which stands above it"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_kernels_know_nothing_of_the_system_and_the_system_nothing_of_triton(path):
    modules = {module.split(".")[0] for module, _ in imported(ast.parse(path.read_text()))}
    if path.is_relative_to(ROOT / "kernels"):
        assert "sfd_fast" not in modules
    else:
        assert "triton" not in modules


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_optional_packages_are_imported_lazily_and_in_one_file(path):
    tree = ast.parse(path.read_text())
    at_import = {m.split(".")[0] for node in tree.body for m, _ in imported(node) if not is_function(node)}
    name = str(path.relative_to(ROOT))
    for package, files in ONE_FILE.items():
        everywhere = {m.split(".")[0] for m, _ in imported(tree)}
        if package in everywhere:
            assert name in files, f"{name} imports {package}; only {files} may"
        assert package not in at_import, f"{name} imports {package} when it is imported itself"


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef)


def test_pypis_kernels_is_found_from_the_repository_root(tmp_path):
    """A folder without __init__.py is a namespace package, which any real package of that name precedes."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("origin = 'PyPI'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; assert kernels.origin == 'PyPI'"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_makes_no_files_and_asks_no_device(tmp_path):
    code = (
        "import torch, os\n"
        "torch.cuda.init = torch.cuda.is_available = lambda *a: (_ for _ in ()).throw(AssertionError('device query'))\n"
        "import sfd_fast.cli, sfd_fast.config.presets, sfd_fast.diffusion.transport, sfd_fast.sampling.sampler\n"
        "import sfd_fast.models.dit, sfd_fast.training.loop, sfd_fast.data.load.latents\n"
        "assert os.listdir('.') == [], os.listdir('.')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
