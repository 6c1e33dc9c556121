"""Imports run one way, optional packages are imported in one file each, importing does nothing: from syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(ROOT.glob("sfd_fast/**/*.py")) + sorted(ROOT.glob("kernels/sfd_kernels/**/*.py"))

# what a part of sfd_fast may import beside itself
BASE = {"files", "config", "ranks"}
METHOD = BASE | {"diffusion", "models"}
FORMATS = METHOD | {"formats"}
TRAINING = FORMATS | {"data", "sampling", "training", "evaluation", "pictures"}
MAY_IMPORT = {
    "files": set(),
    "config": {"files"},
    "ranks": {"files", "config"},
    "pictures": BASE,
    "evaluation": BASE,
    "diffusion": METHOD,
    "models": METHOD,
    "formats": FORMATS,
    "data": FORMATS,  # data and sampling are siblings
    "sampling": FORMATS,
    "training": TRAINING,
    "planning": TRAINING | {"planning"},
    "app": FORMATS | {"sampling", "pictures"},
    "commands": TRAINING | {"planning", "app"},
    "cli": TRAINING | {"planning", "commands"},
    "__main__": {"cli"},
    "__init__": TRAINING,
}
AT_THE_ROOT = {"__init__", "__main__", "cli", "pictures", "ranks"}
ONE_FILE = {
    "deepspeed": {"sfd_fast/training/engines/deepspeed.py"},
    "nvidia": {"sfd_fast/data/images/dali.py"},
    "flash_attn": {"sfd_fast/models/attention.py"},
    "flash_attn_interface": {"sfd_fast/models/attention.py"},
    "xformers": {"sfd_fast/models/attention.py"},
    "apex": {"sfd_fast/training/optimizer.py"},
    "gradio": {"sfd_fast/app/page.py"},
}




def name_of(path: Path) -> str:
    base = ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def imported(tree: ast.AST, package: tuple[str, ...] = ()) -> list[tuple[str, int]]:
    """(dotted name, line) of everything that a tree imports, lazily too; package: where relative imports begin."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.append((module, node.lineno))
            found += [(f"{module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def imports_of(path: Path) -> list[tuple[str, int]]:
    name = tuple(name_of(path).split("."))
    return imported(ast.parse(path.read_text()), name if path.name == "__init__.py" else name[:-1])


def modules_of(path: Path) -> set[str]:
    """Modules of ours that a file imports: of `from package import name` the module `name`, where it is one."""
    names = {name for name, _ in imports_of(path)}
    return {n for n in names if n in MODULES and not any(other.startswith(f"{n}.") for other in names & MODULES.keys())}


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(ROOT / "sfd_fast")], ids=name_of)
def test_imports_run_one_way(path):
    own = (name_of(path).split(".") + ["__init__"])[1]
    assert own in MAY_IMPORT, f"{path} is of no part that this test knows"
    for module, line in imports_of(path):
        part = (module.split(".") + ["__init__"])[1]
        if not module.startswith("sfd_fast") or part.startswith("__"):
            continue
        if own == "commands" and part == own:
            assert module == name_of(path), f"{path}:{line} imports {module}: nothing but the command line does"
        else:
            assert part in MAY_IMPORT[own] | {own}, f"{path}:{line} imports {module}, which stands above or beside it"


def test_no_module_stands_at_the_root_but_those_of_the_plan():
    assert {path.stem for path in (ROOT / "sfd_fast").glob("*.py")} == AT_THE_ROOT


def test_no_files_import_each_other_in_a_circle():
    graph = {name: modules_of(path) - {name} for name, path in MODULES.items()}
    done, path = set(), []

    def visit(name):
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name):], name])}"
        if name in done:
            return
        path.append(name)
        for other in sorted(graph[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_kernels_know_nothing_of_the_system_and_the_system_nothing_of_triton(path):
    modules = {module.split(".")[0] for module, _ in imports_of(path)}
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
