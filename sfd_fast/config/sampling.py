"""How images are sampled: guidance and the solver."""

from collections.abc import Mapping
from dataclasses import dataclass, make_dataclass, replace
from typing import Annotated, Literal

from sfd_fast.config.checks import Fraction, Positive, Range, Settings, annotations, from_dict, require
from sfd_fast.config.model import ModelConfig

MAX_STEPS = 100_000
"""more steps than any solver has a use for: a slip of the hand, which would run for ever"""
SamplingPrecision = Literal["auto", "fp32", "bf16"]
"""of the networks' weights; auto: bf16 on a GPU that computes in it, else fp32"""
SamplingBackend = Literal["auto", "eager", "compile", "cuda_graph"]
"""how the networks run; auto: captured graphs on CUDA, else eager"""
NumSteps = Annotated[int, Range(1, MAX_STEPS)]


@dataclass(frozen=True)
class GuidanceConfig(Settings, section="guidance", may_change=True):
    """How sampling is guided (docs/METHOD.md 5). Separate scales default to `scale`."""

    mode: Literal["none", "cfg", "autoguidance"] = "none"
    scale: float = 1.0
    texture_scale: float | None = None
    semantic_scale: float | None = None
    interval_start: Fraction = 0.0
    """below this time of a stream's own clock that stream is not guided"""
    interval_mode: Literal["both", "tex", "sem"] = "both"
    """streams to which the interval applies; the other stays guided"""

    def __post_init__(self) -> None:
        super().__post_init__()
        separate = self.texture_scale is not None or self.semantic_scale is not None
        require(
            self.mode != "none" or (self.scale == 1.0 and not separate),
            "a guidance scale is set while guidance mode is 'none'; set guidance.mode (`sfd sample`: "
            "--guidance_mode) to 'cfg' or 'autoguidance'",
        )

    @property
    def scales(self) -> tuple[float, float]:
        """(texture, semantic) weight w in v_weak + w (v_main - v_weak); 1 changes nothing."""
        texture = self.scale if self.texture_scale is None else self.texture_scale
        semantic = self.scale if self.semantic_scale is None else self.semantic_scale
        return texture, semantic

    @property
    def active(self) -> bool:
        return self.mode != "none" and self.scales != (1.0, 1.0)


@dataclass(frozen=True)
class SamplerConfig(Settings, section="sampler", may_change=True):
    """The ODE solver over tau in [0, 1 + delta_t] (docs/METHOD.md 5)."""

    solver: Literal["euler", "midpoint", "heun", "ab2", "abm3", "rk4", "dopri5"] = "abm3"
    """abm3 needs the fewest evaluations for a given error (benchmarks/sampling.py)"""
    num_inference_steps: NumSteps = 32
    """steps over the whole interval; network evaluations are as many (heun and midpoint: twice, rk4: four times)"""
    grid: Literal["exact", "released"] = "exact"
    """exact: stage borders are grid points; released: num_inference_steps + 1 even points, masks at each evaluation"""
    timestep_shift: Positive = 1.0
    """u' = s u / (1 + (s - 1) u) on normalised time; 1 changes nothing"""
    atol: Positive = 1e-6
    rtol: Positive = 1e-3
    """tolerances of dopri5 only"""


SETTINGS = {
    "num_inference_steps": (SamplerConfig, "num_inference_steps"),
    "solver": (SamplerConfig, "solver"),
    "timestep_shift": (SamplerConfig, "timestep_shift"),
    "time_grid": (SamplerConfig, "grid"),
    "atol": (SamplerConfig, "atol"),
    "rtol": (SamplerConfig, "rtol"),
    "guidance_scale": (GuidanceConfig, "scale"),
    "guidance_mode": (GuidanceConfig, "mode"),
    "texture_scale": (GuidanceConfig, "texture_scale"),
    "semantic_scale": (GuidanceConfig, "semantic_scale"),
    "interval_start": (GuidanceConfig, "interval_start"),
    "interval_mode": (GuidanceConfig, "interval_mode"),
}
"""single settings by the names that `sfd sample` and SFDPipeline's calls give them"""

SingleSettings = make_dataclass(
    "SingleSettings",
    [(name, annotations(kind)[field] | None, None) for name, (kind, field) in SETTINGS.items()],
    bases=(Settings,),
    frozen=True,
    kw_only=True,
    namespace={
        "__module__": __name__,
        "__doc__": "Options of the names of SETTINGS; None: not given.\n\nArgs:\n"
        + "\n".join(f"    {name}: instead of the pipeline's own" for name in SETTINGS),
    },
)


def with_settings(
    sampler: SamplerConfig, guidance: GuidanceConfig, settings: Mapping[str, object], *, mode: str
) -> tuple[SamplerConfig, GuidanceConfig]:
    """Sampler and guidance with single settings put in: names of SETTINGS; None leaves what is there.

    guidance_scale replaces separate scales too. A scale where guidance is off turns it on in the given mode, and
    guidance_mode none turns it off. Raises ValueError for unknown names and settings that contradict each other.
    """
    named = vars(from_dict(SingleSettings, dict(settings)))
    settings = {name: value for name, value in named.items() if value is not None}
    given: dict[type, dict] = {SamplerConfig: {}, GuidanceConfig: {}}
    for name, value in settings.items():
        kind, field = SETTINGS[name]
        given[kind][field] = value
    changes = given[GuidanceConfig]
    scales = {name: value for name, value in settings.items() if name.endswith("_scale")}
    if settings.get("guidance_mode") == "none":
        for name, scale in scales.items():
            require(
                scale == 1,
                f"{name} {scale} contradicts guidance_mode none: leave one of them out, or give --guidance_mode cfg or "
                "autoguidance",
            )
        changes |= {"scale": 1.0, "texture_scale": None, "semantic_scale": None}
    elif "guidance_scale" in scales:
        changes = {"texture_scale": None, "semantic_scale": None} | changes
    if guidance.mode == "none" and any(scale != 1 for scale in scales.values()):
        changes = {"mode": mode} | changes
    return replace(sampler, **given[SamplerConfig]), replace(guidance, **changes)


def require_null_class(guidance: GuidanceConfig, model: ModelConfig) -> None:
    """Raises ValueError for classifier-free guidance of a model that never saw the null class."""
    require(
        guidance.mode != "cfg" or not guidance.active or model.class_dropout > 0,
        "guidance mode 'cfg' needs a null class, and this model was trained without one (class_dropout 0): use "
        "mode 'autoguidance' with a guide, or 'none' (--guidance_mode)",
    )
