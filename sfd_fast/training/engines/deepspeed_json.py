"""The DeepSpeed JSON of a run: generated from our configuration, then overridden by a file; contradictions are errors.

DeepSpeed itself is not imported here.
"""

import json
from pathlib import Path

from sfd_fast.config import DeepSpeedConfig, OptimizerConfig, TrainConfig, require

BUCKETS: dict[str, tuple[int, str]] = {
    "reduce_bucket_size": (
        50_000_000, "elements; 100 to 200 MB saturate a link, and XL's gradients still make 14 buckets that overlap "
        "the backward pass (DeepSpeed's 500M puts most of a model into one bucket: nothing overlaps)",
    ),
    "allgather_bucket_size": (
        200_000_000, "elements; ZeRO 1 and 2 gather all weights once after the step, so few large messages are best",
    ),
    "stage3_prefetch_bucket_size": (
        50_000_000, "elements; about one XXL block (42M) ahead of its use hides the gather behind a block's products",
    ),
    "stage3_param_persistence_threshold": (
        20_000, "elements; biases and norm weights stay whole: a gather of a few kB is all latency",
    ),
    "stage3_max_live_parameters": (
        300_000_000, "elements; about seven XXL blocks may be whole at once, a quarter of the model",
    ),
    "stage3_max_reuse_distance": (
        300_000_000, "elements; a block used in forward is used again only in backward: keep none but the last ones",
    ),
    "sub_group_size": (
        200_000_000, "elements; the optimizer steps this much at a time, which bounds the gradient copy to 0.8 GB",
    ),
}  # fmt: skip
"""zero_optimization sizes: (value, reason)"""

OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "torch_autocast.enabled": "train.precision",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer",
    "zero_optimization.offload_param.device": "deepspeed.offload_parameters",
}
"""keys that a DeepSpeed file must not contradict, and the field of ours that sets them"""
OFF = (None, False, 0, "none", {})
"""ways to say that something is not used; to leave its key out is another"""


def batch_shares(train: TrainConfig, world_size: int) -> tuple[int, int]:
    """(micro-batch size of a rank, accumulation steps); ValueError where the global batch does not divide."""
    size, micro = train.global_batch_size, train.micro_batch_size
    require(
        size % world_size == 0,
        f"train.global_batch_size {size} must be a multiple of the {world_size} ranks; use "
        f"{max(size // world_size, 1) * world_size} or {(size // world_size + 1) * world_size}, or fewer ranks",
    )
    share = size // world_size
    micro = micro or share
    require(
        share % micro == 0,
        f"each of {world_size} ranks takes {share} of train.global_batch_size {size}, which train.micro_batch_size "
        f"{micro} does not divide; use one of {[m for m in range(1, share + 1) if share % m == 0]}",
    )
    return micro, share // micro


def generate(
    train: TrainConfig, optimizer: OptimizerConfig, deepspeed: DeepSpeedConfig, *, world_size: int, device: str
) -> dict:
    """The JSON for deepspeed.initialize. Clipping stays 0: our optimizer folds it into its one pass.

    Raises ValueError where settings contradict each other.
    """
    micro, accumulation = batch_shares(train, world_size)
    stage = deepspeed.zero_stage
    require(
        optimizer.name == "adamw_ema",
        f"optimizer.name is '{optimizer.name}', but train.engine 'deepspeed' shards the averages inside adamw_ema's "
        "state; set optimizer.name to adamw_ema, or train.engine to torch",
    )
    require(
        train.precision in ("parity", "fp32") or stage >= 1,
        f"train.precision '{train.precision}' keeps fp32 masters in ZeRO's optimizer, but deepspeed.zero_stage is 0; "
        "use zero_stage 1 (it costs no more communication), or precision parity",
    )
    require(
        train.precision not in ("bf16", "fp16") or accumulation == 1 or stage >= 2,
        f"train.precision '{train.precision}' with {accumulation} accumulated micro-batches sums gradients in "
        f"{train.precision} under ZeRO 1; use zero_stage 2 (it sums in fp32), micro_batch_size 0, or precision parity",
    )
    require(
        not train.compile or stage < 3,
        "train.compile does not work with deepspeed.zero_stage 3: traced code reads a sharded weight before DeepSpeed "
        "has gathered it (its size is 0); use zero_stage 0, 1 or 2, or leave train.compile out",
    )
    only_stage3 = ("stage3", "sub_")
    sizes = {name: value for name, (value, _) in BUCKETS.items() if stage == 3 or not name.startswith(only_stage3)}
    # overlap is a second CUDA stream: gloo has none, and there it would only cost a second bucket
    zero = {"stage": stage, "overlap_comm": device == "cuda", "contiguous_gradients": True, **sizes}
    if deepspeed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device == "cuda"}
    if deepspeed.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": device == "cuda"}
    config = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if train.precision == "parity":
        # an empty list of modules: gradients travel in fp32, so sums over ranks round as one process's do
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    elif train.precision == "bf16":
        config["bf16"] = {"enabled": True}
    elif train.precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000}
    if train.precision in ("bf16", "fp16") and accumulation > 1:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if deepspeed.config_file:
        config = overridden(config, read_overrides(deepspeed.config_file), deepspeed.config_file)
    return config


def read_overrides(path: str) -> dict:
    try:
        values = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"deepspeed.config_file {path} is not JSON: {error}") from error
    require(isinstance(values, dict), f"deepspeed.config_file {path} must hold one JSON object")
    return values


def overridden(config: dict, values: dict, source: str, prefix: str = "") -> dict:
    """config with the values merged in; ValueError where they contradict a field of ours."""
    merged = dict(config)
    for key, value in values.items():
        path = f"{prefix}{key}"
        same = value == config.get(key) or (value in OFF and config.get(key) in OFF)
        if path.startswith("zero_optimization.offload_") and key == "device" and value == "nvme":
            raise ValueError(
                f"{source} sets {path} to 'nvme', but weights, moments and averages in DeepSpeed's swap files would be "
                "missing from checkpoints, which are made from memory; use 'cpu' (deepspeed.offload_optimizer, "
                "offload_parameters), optimizer.moments bf16, or more ranks"
            )
        if path in OWNED and not same and value != "auto":
            raise ValueError(
                f"{source} sets {path} to {value!r}, which contradicts {OWNED[path]} (it gives {config.get(key)!r}); "
                f"set {OWNED[path]} and leave {path} out of the file"
            )
        if isinstance(config.get(key), dict) and not isinstance(value, dict) and value != "auto":
            raise ValueError(f"{source} sets {path} to {value!r}; it must be an object, whose keys are merged")
        if isinstance(value, dict):
            merged[key] = overridden(config.get(key) or {}, value, source, f"{path}.")
        elif value != "auto":
            merged[key] = value
    return merged
