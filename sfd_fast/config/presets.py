"""Model sizes and settings of the released data as tables: a preset is a readable row, a variant `replace(XL, ...)`.

Sizes: docs/METHOD.md 3 (depth x width x heads, patch 1). Parameters include the REPA head.
"""

from dataclasses import asdict, replace

from sfd_fast.config.model import ModelConfig

#                                                                         parameters   FID no guidance / guided
MICRO = ModelConfig(depth=4, hidden_size=128, num_heads=4, repa_hidden=256)     # for a first look on a laptop
TINY = ModelConfig(depth=8, hidden_size=256, num_heads=4, repa_hidden=512)      # for a small data set on a laptop
S = ModelConfig(depth=12, hidden_size=384, num_heads=6)
B = ModelConfig(depth=12, hidden_size=768, num_heads=12)                # 137.6M       10.40 at 400K (paper)
L = ModelConfig(depth=24, hidden_size=1024, num_heads=16)
XL = ModelConfig(depth=28, hidden_size=1152, num_heads=16)              # 682.8M       2.54 / 1.06 at 800 epochs
XXL = ModelConfig(depth=24, hidden_size=1536, num_heads=24)             # 1037.2M      2.38 / 1.04 at 800 epochs
H1P6B = ModelConfig(depth=28, hidden_size=1792, num_heads=28)
B_GUIDE = B  # the released AutoGuidance guide: B, trained for 60K to 120K steps (docs/METHOD.md 5)
DIGITS = ModelConfig(
    depth=4, hidden_size=96, num_heads=4, grid_size=4, texture_channels=4, semantic_channels=4, num_classes=10,
    repa_channels=32, repa_hidden=128,
)  # fmt: skip
"""The embedded demo: 8 x 8 handwritten digits in pixel space (2 x 2 pixels a token), trained in minutes on a CPU."""
DIGITS_GUIDE = replace(DIGITS, depth=2, repa_depth=1)

PRESETS: dict[str, ModelConfig] = {
    "S": S, "B": B, "L": L, "XL": XL, "XXL": XXL, "1p6B": H1P6B, "B_GUIDE": B_GUIDE, "TINY": TINY, "MICRO": MICRO,
    "DIGITS": DIGITS, "DIGITS_GUIDE": DIGITS_GUIDE,
}  # fmt: skip

MODEL_DEFAULTS: dict[str, dict] = {name: {"model": asdict(row)} for name, row in PRESETS.items()}
"""What --preset of `sfd train` fills in."""

FEATURES_DEFAULTS: dict[str, dict] = {
    # what the released SemVAE was trained on: shorter side to 256, centre 224 (docs/METHOD.md 2)
    "imagenet256": {
        "vfm": "dinov2-b", "image_size": 224, "grid_size": 16, "crop": "resize", "flip": False, "storage": "fp16",
        "background": "released",
    },
}  # fmt: skip
"""What --preset of `sfd features` fills in."""
ENCODE_DEFAULTS: dict[str, dict] = {
    # what the released SFD was trained on: ADM crop, both flips, float32 posterior samples (docs/METHOD.md 2 and 6)
    "imagenet256": {
        "vfm": "dinov2-b", "image_size": 256, "crop": "adm", "flip": True, "storage": "fp32", "posterior": "sample",
        "background": "released",
    },
}  # fmt: skip
"""What --preset of `sfd encode` fills in."""

RELEASED_NAMES = {"S/1": S, "B/1": B, "L/1": L, "XL/1": XL, "1p0B/1": XXL, "1p6B/1": H1P6B} | {
    f"{name}/2": replace(preset, patch_size=2)
    for name, preset in {"S": S, "B": B, "L": L, "XL": XL, "1p0B": XXL, "1p6B": H1P6B}.items()
}
"""model_type of released configurations, less the prefix `LightningDiT-`."""


def preset(name: str) -> ModelConfig:
    """The row of that name; ValueError lists the names."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset '{name}'; presets: {', '.join(PRESETS)}")
    return PRESETS[name]
