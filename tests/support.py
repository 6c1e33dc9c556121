"""Where golden tensors lie and how tests read them."""

import json
from pathlib import Path

from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


def load_golden(name: str) -> dict[str, Tensor]:
    """Tensors of NAME.safetensors from the golden folder, for example "sfd.golden" or "sfd.weights"."""
    from safetensors.torch import load_file  # here: the kernels' tests run with torch alone

    return load_file(GOLDEN / f"{name}.safetensors")


def load_golden_config(name: str) -> dict:
    """Constructor arguments of golden model NAME under the released names."""
    return json.loads((GOLDEN / f"{name}.config.json").read_text())
