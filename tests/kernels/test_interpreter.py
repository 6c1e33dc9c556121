"""The Triton kernels on CPU tensors, in Triton's interpreter and a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this already runs in the interpreter")
@pytest.mark.parametrize("name", ["test_ops.py", "test_edges.py", "offline/test_traffic.py"])
def test_triton_kernels_pass_in_the_interpreter(name):
    # Triton reads TRITON_INTERPRET when a kernel is decorated, hence the separate process.
    command = [sys.executable, "-m", "pytest", str(HERE / name), "-q", "-x", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
