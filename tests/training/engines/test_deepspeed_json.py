"""The generated DeepSpeed JSON: sections, bucket sizes, what a user's file may override, and contradictions."""

import json

import pytest

from sfd_fast.config import DeepSpeedConfig, OptimizerConfig, TrainConfig
from sfd_fast.training.engines.deepspeed_json import BUCKETS, batch_shares, generate


def made(values, path, *, zero_stage=1, precision="parity", **settings):
    """The JSON after a user's file with these values."""
    path.write_text(json.dumps(values))
    settings = DeepSpeedConfig(zero_stage=zero_stage, config_file=str(path), **settings)
    return generate(TrainConfig(precision=precision), OptimizerConfig(), settings, world_size=8, device="cuda")


@pytest.mark.parametrize(
    ("precision", "section"), [("parity", "torch_autocast"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", None)]
)
def test_each_precision_mode_has_its_section(precision, section):
    train = TrainConfig(global_batch_size=64, micro_batch_size=4, precision=precision)
    made = generate(train, OptimizerConfig(), DeepSpeedConfig(zero_stage=2), world_size=8, device="cuda")
    present = {key for key in ("torch_autocast", "bf16", "fp16") if made.get(key, {}).get("enabled")}
    assert present == ({section} if section else set())
    assert made["gradient_accumulation_steps"] == 2 and made["gradient_clipping"] == 0.0
    assert made["zero_optimization"]["overlap_comm"] is True
    assert "stage3_prefetch_bucket_size" not in made["zero_optimization"]


def test_every_bucket_size_has_a_reason():
    made = generate(TrainConfig(), OptimizerConfig(), DeepSpeedConfig(zero_stage=3), world_size=8, device="cuda")
    for name, (value, reason) in BUCKETS.items():
        assert made["zero_optimization"][name] == value and len(reason) > 30


def test_a_file_overrides_what_is_not_ours(tmp_path):
    path = tmp_path / "deepspeed.json"
    values = {"zero_optimization": {"reduce_bucket_size": 7, "stage": 1}, "wall_clock_breakdown": True}
    path.write_text(json.dumps(values))
    settings = DeepSpeedConfig(zero_stage=1, config_file=str(path))
    made = generate(TrainConfig(), OptimizerConfig(), settings, world_size=8, device="cuda")
    assert made["zero_optimization"]["reduce_bucket_size"] == 7 and made["wall_clock_breakdown"] is True
    assert made["zero_optimization"]["allgather_bucket_size"] == BUCKETS["allgather_bucket_size"][0]
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(ValueError, match="zero_optimization.stage to 3, which contradicts deepspeed.zero_stage"):
        generate(TrainConfig(), OptimizerConfig(), settings, world_size=8, device="cuda")
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        generate(TrainConfig(), OptimizerConfig(), settings, world_size=8, device="cuda")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload_parameters": True}, "offload_parameters needs zero_stage 3"),
        ({"zero_stage": 0, "offload_optimizer": True}, "offload_optimizer needs zero_stage 1, 2 or 3"),
    ],
)
def test_offload_without_sharding_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DeepSpeedConfig(**settings)


def test_compile_under_zero_3_is_refused_with_its_reason():
    settings = TrainConfig(compile=True), OptimizerConfig(), DeepSpeedConfig(zero_stage=3)
    with pytest.raises(ValueError, match="train.compile does not work with deepspeed.zero_stage 3.*size is 0"):
        generate(*settings, world_size=8, device="cuda")


def test_shares_of_a_batch():
    assert batch_shares(TrainConfig(global_batch_size=256), 8) == (32, 1)
    assert batch_shares(TrainConfig(global_batch_size=256, micro_batch_size=8), 8) == (8, 4)


@pytest.mark.parametrize(
    "values",
    [
        {"fp16": {"enabled": False}, "bf16": {"enabled": False}},
        {"gradient_clipping": 0, "optimizer": None, "scheduler": {}},
        {"zero_optimization": {"offload_optimizer": {"device": "none"}, "offload_param": {"device": None}}},
        {"train_batch_size": "auto", "zero_optimization": {"stage": "auto"}},
    ],
)
def test_to_say_that_something_is_off_contradicts_nothing(tmp_path, values):
    zero = made(values, tmp_path / "file.json")["zero_optimization"]
    assert zero["stage"] == 1 and zero["reduce_bucket_size"] == BUCKETS["reduce_bucket_size"][0]


def test_details_of_offload_may_be_set(tmp_path):
    values = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False, "ratio": 0.5}}}
    zero = made(values, tmp_path / "file.json", zero_stage=3, offload_optimizer=True)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False, "ratio": 0.5}


@pytest.mark.parametrize(
    ("values", "precision", "message"),
    [
        ({"fp16": {"enabled": False}}, "fp16", "fp16.enabled to False, which contradicts train.precision"),
        ({"bf16": {"enabled": True}}, "parity", "bf16.enabled to True, which contradicts train.precision"),
        ({"bf16": None}, "bf16", "sets bf16 to None; it must be an object"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "parity",
            "offload_optimizer.device to 'cpu', which contradicts deepspeed.offload_optimizer",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/disk"}}}, "parity",
            "offload_optimizer.device to 'nvme', but .* would be missing from checkpoints.*use 'cpu'",
        ),
    ],
)  # fmt: skip
def test_what_contradicts_our_fields_is_refused(tmp_path, values, precision, message):
    with pytest.raises(ValueError, match=message):
        made(values, tmp_path / "file.json", precision=precision)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_gradients_are_summed_in_fp32_or_not_at_all(precision):
    train = TrainConfig(global_batch_size=64, micro_batch_size=4, precision=precision)
    for stage in (2, 3):
        settings = DeepSpeedConfig(zero_stage=stage)
        config = generate(train, OptimizerConfig(), settings, world_size=8, device="cuda")
        assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    with pytest.raises(ValueError, match=f"'{precision}' with 2 accumulated micro-batches sums .* use zero_stage 2"):
        generate(train, OptimizerConfig(), DeepSpeedConfig(zero_stage=1), world_size=8, device="cuda")
