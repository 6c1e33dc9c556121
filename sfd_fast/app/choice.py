"""What a person chose on the page, checked, and the same choice as Python and as a command."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path

from sfd_fast.config import GuidanceConfig, require


@dataclass(frozen=True)
class Choice:
    """The settings of one click: image i has the class labels[i] and the noise of sample id i."""

    labels: tuple[int, ...]
    seed: int
    solver: str
    num_inference_steps: int
    guidance: GuidanceConfig


def whole(value: object, name: str) -> int:
    """A field's number as an integer. Raises ValueError that names the field."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()
    require(good, f"{name} is {value if value is not None else 'empty'}: give a whole number")
    return int(value)


def number(value: object, name: str) -> float:
    """A field's number. Raises ValueError that names the field."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6
    require(good, f"{name} is {value if value is not None else 'empty'}: give a number")
    return float(value)


@dataclass(frozen=True)
class Origin:
    """Where the pipeline came from: what the copied code loads."""

    model: str
    guide: str
    texture_codec: str
    batch: int
    precision: str
    device: str

    @property
    def dtype(self) -> str:
        return {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[self.precision]

    def options(self) -> dict[str, object]:
        """What from_pretrained and `sfd sample` have under the same names; empty ones left out."""
        named = {"guide": self.guide, "texture_codec": self.texture_codec}
        return {key: value for key, value in named.items() if value} | {
            "micro_batch_size": self.batch, "device": self.device,
        }  # fmt: skip


def as_python(choice: Choice, origin: Origin) -> str:
    """A script that draws the same pixels on the same machine."""
    given = {f.name: getattr(choice.guidance, f.name) for f in fields(GuidanceConfig)}
    set_ones = [f"{f.name}={given[f.name]!r}" for f in fields(GuidanceConfig) if given[f.name] != f.default]
    options = "".join(f", {key}={value!r}" for key, value in origin.options().items())
    return (
        "import torch\n\n"
        "from sfd_fast import SFDPipeline\n"
        "from sfd_fast.config import GuidanceConfig\n\n"
        f"pipeline = SFDPipeline.from_pretrained({origin.model!r}{options}, torch_dtype={origin.dtype})\n"
        "output = pipeline(\n"
        f"    {list(choice.labels)},\n"
        f"    seed={choice.seed},\n"
        f"    solver={choice.solver!r},\n"
        f"    num_inference_steps={choice.num_inference_steps},\n"
        f"    guidance=GuidanceConfig({', '.join(set_ones)}),\n"
        ")\n"
        "for number, image in enumerate(output.images):\n"
        '    image.save(f"{number}.png")\n'
    )


def as_command(choice: Choice, origin: Origin, out: str = "samples") -> str:
    """A command that draws the same pixels on the same machine, into the folder `out`."""
    guidance = choice.guidance
    options = {
        "model": origin.model, **origin.options(), "precision": origin.precision,
        "labels": ",".join(map(str, choice.labels)), "seed": choice.seed,
        "solver": choice.solver, "num_inference_steps": choice.num_inference_steps, "guidance_mode": guidance.mode,
    }  # fmt: skip
    if guidance.mode != "none":
        texture, semantic = guidance.scales
        options |= {"guidance_scale": texture} if texture == semantic else {
            "texture_scale": texture, "semantic_scale": semantic,
        }  # fmt: skip
    options["out"] = out
    lines = " \\\n    ".join(f"--{name} {shlex.quote(str(value))}" for name, value in options.items())
    return f"sfd sample \\\n    {lines}\n"


def absolute(path: str) -> str:
    """A path that holds from wherever the copied code runs; a hub's name and an empty one stay as they are."""
    return str(Path(path).expanduser().resolve()) if path and Path(path).expanduser().exists() else path
