"""Every setting is checked by its annotation, wherever it comes from; messages name the key and the nearest value."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from sfd_fast.config import (
    DataConfig,
    DeepSpeedConfig,
    FeatureDataConfig,
    GuidanceConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SamplerConfig,
    SemVAEConfig,
    SemVAETrainingConfig,
    SFDConfig,
    TextureConfig,
    TrainConfig,
    TransportConfig,
    from_dict,
    overlaid,
    to_dict,
)
from sfd_fast.config.checks import FilePath, Range, Settings, annotations, changeable, one_of

KINDS = {
    "model": ModelConfig, "transport": TransportConfig, "optimizer": OptimizerConfig, "data": DataConfig,
    "train": TrainConfig, "run": RunConfig, "sampler": SamplerConfig, "guidance": GuidanceConfig,
    "deepspeed": DeepSpeedConfig,
}  # fmt: skip
WRONG = [
    ("train.engine", "fsdp", "train.engine 'fsdp' is unknown; choose torch or deepspeed"),
    ("train.engine", "deepsped", "did you mean 'deepspeed'"),
    ("train.precision", "int8", "train.precision 'int8' is unknown; choose auto, parity, bf16, fp16 or fp32"),
    ("optimizer.schedule", "linear", "optimizer.schedule 'linear' is unknown; choose constant or cosine"),
    ("optimizer.schedule", "Cosine", "did you mean 'cosine'"),
    ("deepspeed.zero_stage", 7, "deepspeed.zero_stage 7 is unknown; choose 0, 1, 2 or 3 .did you mean 3"),
    ("deepspeed.zero_stage", True, "deepspeed.zero_stage True is unknown"),
    ("deepspeed.zero_stage", "1", "deepspeed.zero_stage '1' is unknown"),
    ("guidance.mode", "cgf", "guidance.mode 'cgf' is unknown; choose none, cfg or autoguidance .did you mean 'cfg'"),
    ("data.targets", "onlin", "did you mean 'online'"),
    ("sampler.num_inference_steps", 4.5, "sampler.num_inference_steps 4.5 must be a whole number"),
    ("sampler.num_inference_steps", 10**9, r"sampler.num_inference_steps 1000000000 must be in \[1, 100000\]"),
    ("sampler.num_inference_steps", True, "sampler.num_inference_steps True must be a whole number"),
    ("sampler.num_inference_steps", None, "sampler.num_inference_steps None must be a whole number"),
    ("sampler.atol", math.nan, "sampler.atol nan must be a finite number"),
    ("train.max_steps", "5", "train.max_steps '5' must be a whole number"),
    ("train.max_steps", -1, "train.max_steps -1 must not be negative"),
    ("train.compile", "yes", "train.compile 'yes' must be true or false"),
    ("train.compile", 1, "train.compile 1 must be true or false"),
    ("optimizer.lr", "1e-4", "optimizer.lr '1e-4' must be a finite number"),
    ("optimizer.lr", True, "optimizer.lr True must be a finite number"),
    ("optimizer.lr", math.inf, "optimizer.lr inf must be a finite number"),
    ("optimizer.lr", 10**400, "optimizer.lr 1000.* must be a finite number"),
    ("optimizer.lr", -1, "optimizer.lr -1 must be greater than 0"),
    ("optimizer.beta1", 1.0, r"optimizer.beta1 1.0 must be in \[0, 1\)"),
    ("optimizer.extra_ema_decays", [0.5, 2], r"optimizer.extra_ema_decays\[1\] 2 must be in \[0, 1\)"),
    ("optimizer.extra_ema_decays", 0.5, "optimizer.extra_ema_decays 0.5 must be a list"),
    ("model.depth", 2.0, "model.depth 2.0 must be a whole number"),
    ("data.num_workers", -1, "data.num_workers -1 must not be negative"),
    ("run.out", 5, "run.out 5 must be text"),
    ("run.out", "line\nline", None),
    ("guidance.texture_scale", "w", "guidance.texture_scale 'w' must be a finite number"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_a_wrong_value_is_one_line_with_its_key_from_python_and_from_dictionaries(key, value, message):
    section, name = key.split(".")
    ways = (
        lambda: getattr(KINDS[section](**{name: value}), name),
        lambda: getattr(from_dict(KINDS[section], {name: value}), name),
        lambda: getattr(getattr(from_dict(SFDConfig, {section: {name: value}}), section), name),
        lambda: getattr(getattr(overlaid(SFDConfig(), {key: value}), section), name),
    )
    for way in ways:
        if message is None:
            assert way() == value
            continue
        with pytest.raises(ValueError, match=f"^.*{message}") as error:
            way()
        assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_a_long_or_many_lined_value_stays_one_short_line():
    with pytest.raises(ValueError) as error:
        TrainConfig(engine="a\nb" * 1000)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("kind", [*KINDS.values(), SemVAEConfig, TextureConfig, FeatureDataConfig, SFDConfig])
def test_every_field_of_every_configuration_is_checked(kind):
    """No field takes an object that is none of the types that settings have."""
    for name in annotations(kind):
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            kind(**{name: object()})


def test_lists_become_tuples_and_whole_numbers_floats():
    made = OptimizerConfig(lr=1, extra_ema_decays=[0, 0.5])
    assert type(made.lr) is float and made.extra_ema_decays == (0.0, 0.5)
    assert from_dict(TextureConfig, {"channel_multipliers": [1, 2]}).channel_multipliers == (1, 2)


def test_a_path_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert RunConfig(out="~/runs/a").out == "/home/someone/runs/a"
    assert from_dict(SFDConfig, {"data": {"path": "~/cache"}}).data.path == "/home/someone/cache"
    assert RunConfig(out=Path("runs/a")).out == "runs/a"
    assert DataConfig(path="s3://bucket/~x").path == "s3://bucket/~x"


@dataclass(frozen=True)
class Options(Settings, section="options"):
    where: FilePath
    size: Annotated[int, Range(8, below=64)] = 8
    pair: tuple[int, float] = (1, 2.0)
    labels: tuple[int, ...] | str = ()
    kind: Literal["a", "b"] | None = None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "options.where is missing and has no default"),
        ({"where": "x", "size": 64}, r"options.size 64 must be in \[8, 64\)"),
        ({"where": "x", "pair": [1]}, r"options.pair \[1\] must be a list of 2 entries"),
        ({"where": "x", "pair": [1.5, 1]}, r"options.pair\[0\] 1.5 must be a whole number"),
        ({"where": "x", "labels": 3}, "options.labels 3 must be text"),
        ({"where": "x", "kind": "c"}, "options.kind 'c' is unknown; choose a or b"),
        ({"where": "x", "seize": 9}, "unknown key 'options.seize'; did you mean 'options.size'"),
        ([1], r"options \[1\] must be a group of settings"),
    ],
)
def test_other_annotations(given, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Options, given)


def test_values_that_fit_are_kept():
    made = Options(where="x", size=63, pair=[3, 4], labels=[1, 2], kind=None)
    assert (made.size, made.pair, made.labels, made.kind) == (63, (3, 4.0), (1, 2), None)
    assert Options(where="x", labels="1,2").labels == "1,2"


def test_one_of_serves_plain_arguments():
    assert one_of("backend", "eager", ("eager", "compile")) == "eager"
    with pytest.raises(ValueError, match="backend 'eagr' is unknown; choose eager or compile .did you mean 'eager'"):
        one_of("backend", "eagr", ("eager", "compile"))
    with pytest.raises(ValueError, match="precision 1 is unknown; choose fp32 or bf16"):
        one_of("precision", 1, Literal["fp32", "bf16"])


def test_a_part_of_a_dictionary_leaves_the_rest_as_that_configuration_has_it():
    """SemVAE's training has other defaults than the transformer's for the same fields."""
    made = from_dict(SemVAETrainingConfig, {"train": {"seed": 3}, "run": {"out": "x"}})
    assert (made.train.seed, made.train.max_steps, made.run.checkpoint_every) == (3, 0, 20_000)


def test_overlaid_takes_dotted_and_nested_keys_and_the_last_one_wins():
    made = overlaid(SFDConfig(), {"train": {"seed": 1, "max_steps": 2}, "train.seed": 5, "model": ModelConfig(depth=3)})
    assert (made.train.seed, made.train.max_steps, made.model.depth) == (5, 2, 3)
    assert to_dict(SFDConfig())["train"]["seed"] == 0


def test_what_may_change_when_a_run_goes_on_stands_at_the_settings():
    free = changeable(SFDConfig)
    assert {f"run.{name}" for name in annotations(RunConfig)} <= free
    assert {"train.max_steps", "train.engine", "data.path", "sampler.solver", "deepspeed.zero_stage"} <= free
    fixed = {"train.global_batch_size", "train.seed", "train.precision", "train.residual", "data.flip", "model.depth"}
    assert not fixed & free and not any(key.startswith(("optimizer.", "transport.", "model.")) for key in free)
    assert {key for key in changeable(SemVAETrainingConfig) if key.startswith("data.")} == {
        "data.path", "data.cache_folder",
    }  # fmt: skip
