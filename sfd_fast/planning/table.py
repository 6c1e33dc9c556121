"""A capacity plan as text: assumptions, a table, and the command that trains what fits best."""

import dataclasses
from collections.abc import Iterator

from sfd_fast.config import ModelConfig, SFDConfig
from sfd_fast.config.planning import PlanConfig
from sfd_fast.config.presets import PRESETS
from sfd_fast.planning.memory import GIB
from sfd_fast.planning.plan import RESERVE_GIB, RESERVE_SHARE, CapacityPlan, Option
from sfd_fast.planning.time_bound import BLOCK_BYTES_PER_CHANNEL, DEVICES


def format_plan(made: CapacityPlan) -> str:
    """The plan as a table, with what it assumes: per stage what fits, or else what comes nearest."""
    config, best = made.config, made.best
    lines = [
        f"{made.num_parameters / 1e6:.1f}M parameters, {config.precision}, batch {config.global_batch_size} on "
        f"{config.gpus} x {config.gpu}: {made.limit_gib:.1f} GiB usable on each",
        *assumptions(config),
        "",
        "ZeRO micro recomp.  weights masters  grads moments averages  activ. buffers   step |   peak GiB  fits | "
        "step >= ms   images/s <=",
    ]
    for option in shown(made):
        m = option.memory
        parts = (m.parameters, m.masters, m.gradients, m.moments, m.averages, m.activations, m.buffers, m.step)
        figures = " ".join(f"{part / GIB:7.2f}" for part in parts)
        rate = config.global_batch_size / option.bound.step_s
        lines.append(
            f"{option.zero_stage:4d} {option.micro_batch:5d} {option.checkpoint_activations:7.0%}  {figures} | "
            f"{m.peak / GIB:10.2f} {'yes' if option.fits else 'no':>5} | {1e3 * option.bound.step_s:10.1f} {rate:13.0f}"
        )
    lines += ["", *(f"left out: {reason}" for reason in made.refused)]
    if best is None:
        least = min(made.options, key=lambda o: o.memory.peak)
        lines.append(
            f"nothing fits: the least is {least.memory.peak / GIB:.1f} GiB (ZeRO {least.zero_stage}, micro-batch "
            f"{least.micro_batch}, {least.checkpoint_activations:.0%} recomputed); take more or larger devices, "
            "--precision bf16, --moments bf16, or offload"
        )
    else:
        b = best.bound
        lines += [
            f"fits best: ZeRO {best.zero_stage}, micro-batch {best.micro_batch}, {best.checkpoint_activations:.0%} of "
            f"the blocks recomputed; of the bound {1e3 * b.step_s:.1f} ms, products {1e3 * b.products_s:.1f}, memory "
            f"{1e3 * b.memory_s:.1f}, optimizer {1e3 * b.optimizer_s:.1f}, links {1e3 * b.communication_s:.1f} "
            "(behind computation where they fit)",
            f"  {launcher(config)} {' '.join(train_flags(config, best))}",
        ]
    lines.append("Times are lower bounds from operations, bytes and link speed; no run on such devices is behind them.")
    return "\n".join(lines)


def assumptions(config: PlanConfig) -> list[str]:
    """Speeds and bytes that the figures follow from."""
    device = DEVICES[config.gpu]
    weight = 2 if config.precision in ("bf16", "fp16") else 4
    moments = 8 if config.moments == "fp32" else 4
    return [
        f"assumed of each {config.gpu} ({device.source}): {device.flops / 1e12:g} TFLOP/s dense bf16, "
        f"{device.bandwidth / 1e12:g} TB/s of memory, {device.node_link / 1e9:g} GB/s to the others of its node "
        f"({device.per_node} to a node), {device.network_link / 1e9:g} GB/s to other nodes",
        f"assumed of memory: {RESERVE_SHARE:.0%} and {0 if config.gpu == 'cpu' else RESERVE_GIB:g} GiB stay free for "
        f"driver, NCCL and fragmentation; bytes per parameter: weight {weight}, gradient {weight}, moments {moments}, "
        f"averages {4 * (1 + len(config.extra_ema_decays))}, fp32 master 4 (ZeRO 1 and 2, and 3 with 16-bit weights); "
        "activations counted operator by operator",
        f"assumed of a step: {BLOCK_BYTES_PER_CHANNEL} bytes moved per token, channel and block (fused operators)",
    ]


def shown(made: CapacityPlan) -> list[Option]:
    """What fits, and for a stage of which nothing fits what takes least."""
    rows = []
    for stage in sorted({o.zero_stage for o in made.options}):
        options = [o for o in made.options if o.zero_stage == stage]
        rows += [o for o in options if o.fits] or [min(options, key=lambda o: o.memory.peak)]
    return rows


def launcher(config: PlanConfig) -> str:
    """The command before the flags: alone, one node, or several nodes."""
    per_node = DEVICES[config.gpu].per_node
    if config.gpus == 1:
        return "sfd train"
    if config.gpus <= per_node:
        return f"deepspeed --num_gpus {config.gpus} --module sfd_fast train"
    nodes = -(-config.gpus // per_node)
    return f"deepspeed --hostfile HOSTS --num_nodes {nodes} --num_gpus {per_node} --module sfd_fast train"


def train_flags(config: PlanConfig, option: Option) -> list[str]:
    """Every flag of `sfd train` that the option needs, also those that a preset's recipe would set otherwise."""
    name = next((name for name, model in PRESETS.items() if model == config.model), None)
    flags = ["--preset", name] if name else list(differing("model", config.model, ModelConfig()))
    flags += differing("transport", config.transport, SFDConfig().transport)
    settings = {
        "train.engine": "deepspeed",
        "train.global_batch_size": config.global_batch_size,
        "train.micro_batch_size": option.micro_batch,
        "train.precision": config.precision,
        "train.checkpoint_activations": f"{option.checkpoint_activations:g}",
        "train.residual": config.residual,
        "optimizer.moments": config.moments,
        "deepspeed.zero_stage": option.zero_stage,
    }
    for key, value in settings.items():
        flags += [f"--{key}", str(value)]
    if config.extra_ema_decays:
        flags += ["--optimizer.extra_ema_decays", f"[{','.join(f'{d:g}' for d in config.extra_ema_decays)}]"]
    return flags


def differing(prefix: str, config: object, usual: object) -> Iterator[str]:
    """Flags of the fields of a dataclass that are not as usual."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != getattr(usual, field.name):
            yield f"--{prefix}.{field.name}"
            yield str(value)
