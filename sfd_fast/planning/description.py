"""What `train.dry_run` shows: everything a run would do, without doing it."""

import json

from sfd_fast.config import ModelConfig, to_dict
from sfd_fast.planning.memory import GIB, memory
from sfd_fast.ranks import Ranks
from sfd_fast.training.engines.deepspeed_json import BUCKETS, batch_shares, generate
from sfd_fast.training.job import Job
from sfd_fast.training.loop import check_ranks
from sfd_fast.training.optimizer import learning_rate


def describe(job: Job) -> str:
    """Configuration, sizes, schedule, predicted memory and, with DeepSpeed, its JSON. Raises as the run would."""
    train = job.train
    world_size = Ranks.read().world_size
    check_ranks(train, world_size)
    micro, accumulation = batch_shares(train, world_size)
    trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    rates = [(s, learning_rate(job.optimizer, s, train.max_steps)) for s in milestones(job)]
    lines = [
        json.dumps(to_dict(job.config), indent=1),
        "",
        f"{trained / 1e6:.2f}M trained parameters; {job.num_samples} training samples",
        f"{train.max_steps} steps of {train.global_batch_size} = "
        f"{train.max_steps * train.global_batch_size / max(job.num_samples, 1):.2f} epochs",
        f"{world_size} rank(s), each {accumulation} micro-batch(es) of {micro}",
        "learning rate: " + ", ".join(f"{rate:.3g} at step {step}" for step, rate in rates),
        f"loss terms: {', '.join(job.terms)}; held-out loss: {'yes' if job.evaluate else 'no'}",
    ]
    lines += [f"note: {note}" for note in job.notes]
    sizes = None
    if train.engine == "deepspeed":
        made = generate(train, job.optimizer, job.deepspeed, world_size=world_size, device="cuda")
        lines += ["", "DeepSpeed JSON (on CUDA):", json.dumps(made, indent=1), "", "why these sizes:"]
        zero = made["zero_optimization"]
        sizes = {name: zero[name] for name in BUCKETS if name in zero}
        lines += [f"  {name} = {size}: {reason(name, size)}" for name, size in sizes.items()]
    model = getattr(job.config, "model", None)
    if isinstance(model, ModelConfig):
        stage = job.deepspeed.zero_stage if train.engine == "deepspeed" else 0
        needed = memory(
            model, job.config.transport, world_size=world_size, zero_stage=stage, micro_batch=micro,
            checkpoint_activations=train.checkpoint_activations, precision=train.precision, residual=train.residual,
            moments=job.optimizer.moments, num_averages=1 + len(job.optimizer.extra_ema_decays),
            accumulate=accumulation > 1, offload_optimizer=job.deepspeed.offload_optimizer and stage > 0,
            sizes=sizes,
        )  # fmt: skip
        lines += ["", f"memory of a rank, predicted: {needed.peak / GIB:.2f} GiB"]
        lines += [f"  {name} {value / GIB:.3f}" for name, value in vars(needed).items()]
    return "\n".join(lines)


def reason(name: str, size: int) -> str:
    """Why a bucket has this size: the table's reason, or that the user's file says so."""
    usual, why = BUCKETS[name]
    return why if size == usual else f"set by deepspeed.config_file ({usual} otherwise)"


def show(job: Job) -> None:
    """Prints the description; of several ranks only the first one does."""
    text = describe(job)
    if Ranks.read().first:
        print(text)


def milestones(job: Job) -> list[int]:
    """Steps at which the schedule is worth a look."""
    optimizer, last = job.optimizer, job.train.max_steps - 1
    steps = {0, optimizer.warmup_steps, optimizer.decay_start, last // 2, last}
    return sorted(step for step in steps if 0 <= step <= last)
