"""Hyper-parameters as one table: how each preset is trained and sampled, a row for each recipe, with its source."""

from dataclasses import dataclass, field

from sfd_fast.config.checks import require

PUBLISHED = "released configurations, docs/METHOD.md 4 and 5"
RETRAINING = "released retraining recipe (8 GPUs, FID 3.23 / 1.38), docs/METHOD.md 4"
OURS = "`sfd demo`, tried over several seeds"
LIKE_DEMO = "by analogy with `sfd demo`; no run of this size is published"
ANALOGY = "the released XL's; no run of this size is published"


@dataclass(frozen=True)
class Recipe:
    """One row: optimizer, loss, length and guidance. What all rows share are the defaults of config.py: batch 256,
    AdamW without decay, warm-up or clipping, beta1 0.9, EMA 0.9999, logit-normal times, delta_t 0.3, semantic weight 2.
    """

    lr: float
    beta2: float
    repa_weight: float
    """lambda"""
    repa_mode: str
    max_steps: int
    """5,000 steps are one epoch of ImageNet"""
    guidance_scale: float
    """w of AutoGuidance; 1: none"""
    guide: str
    """AutoGuidance's weaker model; empty where there is none"""
    source: str
    extra: dict[str, object] = field(default_factory=dict)
    """further settings by their full keys"""

    def settings(self) -> dict[str, object]:
        """Every setting of the row by its full key, as `sfd train` takes it."""
        guided = {"guidance.mode": "autoguidance", "guidance.scale": self.guidance_scale} if self.guide else {}
        return {
            "optimizer.lr": self.lr,
            "optimizer.beta2": self.beta2,
            "transport.repa_weight": self.repa_weight,
            "transport.repa_mode": self.repa_mode,
            "train.max_steps": self.max_steps,
            **guided,
            **self.extra,
        }


SHARDED = {"train.engine": "deepspeed", "deepspeed.zero_stage": 1}
"""XXL: ZeRO 1 is what `sfd plan --preset XXL --gpus 8 --gpu h100-80g` names; moments and averages are most of what one
GPU holds, and it sends no more than ZeRO 0"""
DEMO = {
    "train.global_batch_size": 64, "train.precision": "fp32", "run.validate_every": 300, "run.sample_every": 0,
    "run.checkpoint_every": 600, "run.log_every": 25, "run.keep_checkpoints": 1, "data.flip": False,
    "optimizer.warmup_steps": 100, "optimizer.schedule": "cosine",
    "optimizer.final_lr_ratio": 0.0, "optimizer.ema_decay": 0.998, "optimizer.ema_warmup": True,
}  # fmt: skip

SMALL = {
    "train.global_batch_size": 64, "run.checkpoint_every": 500, "run.sample_every": 1000, "optimizer.warmup_steps": 100,
    "optimizer.schedule": "cosine", "optimizer.ema_decay": 0.999, "optimizer.ema_warmup": True,
}  # fmt: skip

RECIPES: dict[tuple[str, str], Recipe] = {
    # preset       recipe             lr    beta2  lambda  REPA     steps      w    guide            source, extra
    ("MICRO",   "laptop"):     Recipe(1e-3, 0.99,  0.5, "cos",       10_000, 1.0, "",              LIKE_DEMO, SMALL),
    ("TINY",    "laptop"):     Recipe(5e-4, 0.99,  0.5, "cos",       30_000, 1.0, "",              LIKE_DEMO, SMALL),
    ("S",       "80ep"):       Recipe(1e-4, 0.999, 1.0, "cos",      400_000, 1.0, "",              ANALOGY),
    ("B",       "80ep"):       Recipe(1e-4, 0.999, 1.0, "cos",      400_000, 1.0, "",              PUBLISHED),
    ("L",       "80ep"):       Recipe(1e-4, 0.999, 1.0, "cos",      400_000, 1.0, "",              ANALOGY),
    ("XL",      "80ep"):       Recipe(1e-4, 0.999, 1.0, "cos",      400_000, 1.6, "B_GUIDE 70k",   PUBLISHED),
    ("XL",      "800ep"):      Recipe(1e-4, 0.999, 1.0, "cos",    4_000_000, 1.5, "B_GUIDE 70k",   PUBLISHED),
    ("XL",      "retraining"): Recipe(2e-4, 0.95,  0.5, "cos_mse",  400_000, 1.0, "",              RETRAINING),
    ("XXL",     "80ep"):       Recipe(1e-4, 0.999, 1.0, "cos",      400_000, 1.5, "B_GUIDE 60k",   PUBLISHED, SHARDED),
    ("XXL",     "800ep"):      Recipe(1e-4, 0.999, 1.0, "cos",    4_000_000, 1.5, "B_GUIDE 120k",  PUBLISHED, SHARDED),
    ("1p6B",    "80ep"):       Recipe(1e-4, 0.999, 1.0, "cos",      400_000, 1.0, "",              ANALOGY, SHARDED),
    ("B_GUIDE", "70k"):        Recipe(1e-4, 0.999, 1.0, "cos",       70_000, 1.0, "",              PUBLISHED),
    ("B_GUIDE", "60k"):        Recipe(1e-4, 0.999, 1.0, "cos",       60_000, 1.0, "",              PUBLISHED),
    ("B_GUIDE", "120k"):       Recipe(1e-4, 0.999, 1.0, "cos",      120_000, 1.0, "",              PUBLISHED),
    ("DIGITS",  "demo"):       Recipe(2e-3, 0.99,  0.5, "cos",        1_500, 1.5, "DIGITS_GUIDE demo", OURS, DEMO),
    ("DIGITS_GUIDE", "demo"):  Recipe(2e-3, 0.99,  0.5, "cos",          300, 1.0, "",              OURS, DEMO),
}  # fmt: skip
"""(preset, recipe): the row. A preset's first row is what `--preset` applies; `--recipe` names another"""


def recipe_names(preset: str) -> list[str]:
    """Recipes of a preset, the usual one first."""
    return [name for owner, name in RECIPES if owner == preset]


def recipe(preset: str, name: str | None = None) -> Recipe:
    """The row of that name, or the preset's usual one. ValueError lists the preset's recipes."""
    names = recipe_names(preset)
    require(
        name is None or name in names,
        f"preset {preset} has no recipe '{name}'; its recipes: {', '.join(names)} (sfd_fast/config/recipes.py)",
    )
    return RECIPES[preset, name or names[0]]
