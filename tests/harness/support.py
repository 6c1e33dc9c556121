"""Where golden tensors lie and how tests read them."""

import gc
import json
from pathlib import Path

import torch
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"


def load_golden(name: str) -> dict[str, Tensor]:
    """Tensors of NAME.safetensors from the golden folder, for example "sfd.golden" or "sfd.weights"."""
    from safetensors.torch import load_file  # here: the kernels' tests run with torch alone

    return load_file(GOLDEN / f"{name}.safetensors")


def load_golden_config(name: str) -> dict:
    """Constructor arguments of golden model NAME under the released names."""
    return json.loads((GOLDEN / f"{name}.config.json").read_text())


def tensors_with_memory() -> list[Tensor]:
    """Every tensor that Python holds and that has memory: no fake or functional one that a trace left behind."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    held = [value for value in gc.get_objects() if issubclass(type(value), Tensor)]
    held = [value for value in held if not issubclass(type(value), FakeTensor | FunctionalTensor)]
    return [value for value in held if not torch._is_functional_tensor(value) and value.device.type != "meta"]
