"""Fixtures shared by all tests: golden tensors, skips with reasons, and the golden count in the closing lines."""

import importlib.util
import os

import pytest
import torch
from harness.support import GOLDEN

NO_GOLDEN = f"no golden tensors: {GOLDEN} is absent (they are kept beside the project, never in it)"
REQUIRED = os.environ.pop("SFD_REQUIRE_GOLDEN", "") == "1"
"""set by .ci/run; taken out of the environment, as some tests run pytest on a part of the tests themselves"""
ran = {"golden": 0, "golden skipped": 0}
OURS = ("sfd_fast", "sfd_kernels", "harness")
EXTRAS = ("triton", "deepspeed", "nvidia.dali", "datasets")
MISSING_EXTRAS: list[str] = []
"""packages that .ci/run asked for (SFD_REQUIRE_EXTRAS=1) and that are not installed: their tests would be skipped"""


class ModuleOfGpuTests(pytest.Module):
    """A test file that is skipped, with the reason, where a package that it imports is not installed."""

    def _getobj(self):
        try:
            return super()._getobj()
        except self.CollectError as error:
            absent = getattr(error.__cause__, "name", None) or ""
            if not isinstance(error.__cause__, ModuleNotFoundError) or absent.split(".")[0] in OURS:
                raise
            reason = f"needs {absent}, which is not installed"
            raise pytest.skip.Exception(reason, allow_module_level=True) from error


def pytest_pycollect_makemodule(module_path, parent):
    """`-m gpu` runs on machines that hold little more than torch; anywhere else a missing package is an error."""
    if parent.config.option.markexpr == "gpu":
        return ModuleOfGpuTests.from_parent(parent, path=module_path)
    return None


def pytest_configure(config):
    config.addinivalue_line("markers", "timeout: of pytest-timeout, which may be absent")
    torch.backends.cudnn.allow_tf32 = False  # fp32 is compared with fp32: convolutions too
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if os.environ.pop("SFD_REQUIRE_EXTRAS", "") == "1":
        MISSING_EXTRAS.extend(name for name in EXTRAS if not is_installed(name))


def is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


@pytest.fixture(scope="session", autouse=True)
def the_same_default_on_every_cpu():
    """Pipelines are fp32 unless a test says otherwise: a CPU with bf16 units would sample in bf16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfd_fast.sampling.latents.has_bf16_units", lambda: False)
        yield


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("golden") and not GOLDEN.is_dir():
            item.add_marker(pytest.mark.skip(reason=NO_GOLDEN))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False here"))


def pytest_runtest_logreport(report):
    if "golden" in report.keywords and "gpu" not in report.keywords:  # those of a GPU are skipped without one
        if report.skipped:
            ran["golden skipped"] += 1
        elif report.when == "call":
            ran["golden"] += 1


def golden_is_missing() -> bool:
    """Whether golden tests did not run although .ci/run asked for them."""
    return REQUIRED and (ran["golden skipped"] > 0 or ran["golden"] == 0)


def pytest_sessionfinish(session, exitstatus):
    if (golden_is_missing() or MISSING_EXTRAS) and exitstatus == 0:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"golden tests: {ran['golden']} RAN, {ran['golden skipped']} SKIPPED")
    if golden_is_missing():
        terminalreporter.write_line(f"FAILED: golden tests must run here ({NO_GOLDEN}); ALLOW_NO_GOLDEN=1 allows it")
    for name in MISSING_EXTRAS:
        terminalreporter.write_line(f"FAILED: {name} must be installed for its tests; ALLOW_NO_EXTRAS=1 allows it")
