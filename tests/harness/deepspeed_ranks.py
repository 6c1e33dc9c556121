"""One rank of the DeepSpeed tests: runs many cases in one launched process, since a launch costs seconds.

`python deepspeed_ranks.py FOLDER CASE ...` under a launcher; FOLDER/data holds the shards. Each case's result goes to
FOLDER/CASE.RANK.json.
"""

import gc
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from harness.support import tensors_with_memory
from harness.tiny_run import MODEL, pixels, tiny_config, with_data
from sfd_fast.config import DeepSpeedConfig, OptimizerConfig, TransportConfig
from sfd_fast.diffusion.transport import training_loss
from sfd_fast.models import dit
from sfd_fast.planning.footprint import LiveBytes
from sfd_fast.planning.memory import memory
from sfd_fast.training.checkpoints import Checkpoints
from sfd_fast.training.diffusion import diffusion_job, initial_model, run_train
from sfd_fast.training.engines import interface
from sfd_fast.training.engines.torch import TorchEngine
from sfd_fast.training.loop import Stop, build_engine, micro_batches
from sfd_fast.training.state import snapshot_pieces

CASES = {}
RANK = int(os.environ.get("RANK", "0"))


def case(function):
    CASES[function.__name__] = function
    return function


def config(folder, name, stage=2, overrides=None, **train):
    settings = {"engine": "deepspeed", "log_every": 1, "checkpoint_every": 1000} | train
    made = tiny_config(folder / "data", folder / name, **settings)
    extra = {}
    if overrides:
        extra["config_file"] = str(folder / f"{name}.{RANK}.overrides.json")
        Path(extra["config_file"]).write_text(json.dumps(overrides))
    return replace(made, deepspeed=DeepSpeedConfig(zero_stage=stage, timeout_s=60, **extra))


NOT_PERSISTENT = {"zero_optimization": {"stage3_param_persistence_threshold": 100}}
"""the tiny model's parameters would all be small enough to stay whole under ZeRO 3"""


def train(made):
    return run_train(made, device="cpu", progress=False)


def losses(result):
    return [row["loss"] for row in result.metrics if row["kind"] == "train"]


def figures(result):
    return {"losses": losses(result), "step": result.step, "exit_code": result.exit_code,
            "events": [row["message"] for row in result.metrics if row["kind"] == "event"],
            "validation": [row for row in result.metrics if row["kind"] == "validation"]}  # fmt: skip


def stopped_at(step, made):
    """Runs until `step` as if asked to stop there; the answer of any_rank comes one step later."""
    calls = itertools.count(1)
    requested = Stop.requested
    Stop.requested = lambda self: next(calls) == step
    try:
        return train(made)
    finally:
        Stop.requested = requested


def after_steps(made, action):
    """Waits until the run has logged a few steps, then acts."""
    log = Path(made.run.out) / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < 5:
        time.sleep(0.01)
    action()


@case
def stages(folder):
    """Losses of 30 steps under every ZeRO stage, with clipping, accumulation, validation and averages."""
    out = {}
    for stage in range(4):
        settings = {"max_steps": 30, "validate_every": 15, "micro_batch_size": 2}
        settings |= {"sample_every": 30, "num_sample_images": 5} if stage >= 2 else {}
        overrides = NOT_PERSISTENT if stage == 3 else None
        out[stage] = figures(train(config(folder, f"stages-{stage}", stage, overrides, **settings)))
    return out


@case
def resume(folder):
    """Stopped at steps 3 and 6 and resumed, beside unbroken runs, for each stage and precision: their rows."""
    out = {}
    for stage, precision in ((0, "fp32"), (1, "bf16"), (2, "parity"), (3, "fp32"), (3, "bf16")):
        name = f"resume-{stage}-{precision}"
        overrides = NOT_PERSISTENT if stage == 3 else None
        # with 4 the stops lie between two rows, whose sums over ranks travel with the checkpoint
        settings = {"precision": precision, "log_every": 4 if precision == "parity" else 1}
        unbroken = train(config(folder, f"{name}-unbroken", stage, overrides, **settings))
        broken = config(folder, f"{name}-broken", stage, overrides, **settings)
        assert stopped_at(3, broken).exit_code == 75
        assert stopped_at(2, broken).exit_code == 75
        results = unbroken, train(broken)
        out[f"{stage}-{precision}"] = [[r for r in run.metrics if r["kind"] == "train"] for run in results]
    return out


def held_bytes(folder, name):
    """Bytes of weights, gradients, moments and averages on this rank under ZeRO 3, in the middle of a step.

    Whole storages, each counted once, under the first part that it belongs to.
    """
    made = config(folder, name, 3, NOT_PERSISTENT, max_steps=4)
    made = replace(made, model=replace(MODEL, hidden_size=128, depth=3, num_heads=4))
    job = diffusion_job(made)
    engine = build_engine(job, "cpu")
    batches = job.batches(0, engine)
    engine.train_step([next(batches)], 1e-3)
    seen = {}
    prepare = engine.optimizer.before_step

    def measure():
        prepare()
        zero = engine.zero
        flats = zero.fp32_partitioned_groups_flat
        parts = {
            "parameters": [p.ds_tensor for p in engine.named.values()],
            "masters apart from weights": flats,
            "weights left whole": [p.data for p in engine.named.values()],
            "gradients": [zero.grad_partitions_flat_buffer],
            "gradients copied for the step": [flat.grad for flat in flats if flat.grad is not None],
            "moments and average": [v for flat in flats for v in engine.optimizer.state[flat].values() if v.dim()],
        }
        known = set()
        for part, tensors in parts.items():
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
            seen[part] = sum(size for place, size in storages.items() if place not in known)
            known |= storages.keys()

    engine.optimizer.before_step = measure
    engine.train_step([next(batches)], 1e-3)
    engine.close()
    return seen


@case
def shares(folder):
    return held_bytes(folder, "shares")


@case
def shares_of_one(folder):
    """The same engine on one rank, the denominator."""
    return held_bytes(folder, "shares-of-one")


class Footprint(NamedTuple):
    """One way to run, whose memory is predicted and measured."""

    zero_stage: int
    precision: str
    micro_batch: int
    checkpoint_activations: float
    accumulation: int = 1
    offload: bool = False

    def predicted(self):
        """Bytes of a rank of two; what is offloaded counts too, as host memory is the only one here."""
        made = memory(
            FOOTPRINT_MODEL, TransportConfig(), world_size=2, zero_stage=self.zero_stage, micro_batch=self.micro_batch,
            checkpoint_activations=self.checkpoint_activations, precision=self.precision,
            accumulate=self.accumulation > 1, overlap=False, offload_optimizer=self.offload, sizes=FOOTPRINT_SIZES,
        )  # fmt: skip
        return made.peak + made.host

    def __str__(self):
        words = [f"ZeRO {self.zero_stage}, {self.precision}, micro-batch {self.micro_batch}"]
        words += [f"{self.checkpoint_activations:.0%} recomputed"]
        words += [f"{self.accumulation} accumulated"] * (self.accumulation > 1) + ["offload"] * self.offload
        return ", ".join(words)


FOOTPRINTS = [
    Footprint(0, "fp32", 4, 0.0), Footprint(1, "fp32", 4, 0.0), Footprint(2, "parity", 2, 0.0),
    Footprint(2, "bf16", 4, 1.0), Footprint(3, "fp32", 4, 1.0), Footprint(3, "bf16", 2, 0.0),
]  # fmt: skip
MORE_FOOTPRINTS = [
    Footprint(0, "parity", 2, 0.5), Footprint(1, "parity", 4, 0.5), Footprint(2, "fp32", 2, 0.0, accumulation=2),
    Footprint(2, "bf16", 2, 0.5, accumulation=2), Footprint(3, "parity", 4, 0.5),
    Footprint(2, "fp32", 2, 0.0, offload=True), Footprint(3, "fp32", 2, 0.0, offload=True),
]  # fmt: skip
"""for benchmarks/soak.py"""
FOOTPRINT_MODEL = replace(
    MODEL, hidden_size=192, depth=4, num_heads=3, patch_size=1, grid_size=16, repa_channels=32, repa_hidden=64
)
FOOTPRINT_SIZES = {
    "reduce_bucket_size": 500_000, "allgather_bucket_size": 1_000_000, "stage3_prefetch_bucket_size": 300_000,
    "stage3_param_persistence_threshold": 2_000, "stage3_max_live_parameters": 1_000_000,
    "stage3_max_reuse_distance": 1_000_000, "sub_group_size": 1_000_000,
}  # fmt: skip


def random_batch(model, size):
    side = model.grid_size
    return {
        "latents": torch.randn(size, model.channels, side, side), "labels": torch.zeros(size, dtype=torch.int64),
        "sample_ids": torch.arange(size), "features": torch.randn(size, model.num_tokens, model.repa_channels),
    }  # fmt: skip


class LiveTensors(LiveBytes):
    """Bytes of the tensors that operators make while they run; never what gloo's threads hold for a moment."""

    def repeated(self, function, args):
        return function(*args)


def tensors_in_memory():
    """Every tensor that Python holds, and gradients, which it may not hold itself."""
    held = tensors_with_memory()
    return held + [value.grad for value in held if value.is_leaf and value.grad is not None]


def peak_bytes(start, step):
    """Most bytes in tensors at once during step(start()), less those from before start()."""
    gc.collect()
    before = tensors_in_memory()  # kept to the end, so that none of these places in memory is used again
    state = start()
    gc.collect()
    counter = LiveTensors()
    counter.ignore(before)
    places = {value.untyped_storage().data_ptr() for value in before}
    for value in tensors_in_memory():
        storage = value.untyped_storage()
        if storage.data_ptr() not in places:  # DeepSpeed keeps several storages over one place in memory
            places.add(storage.data_ptr())
            counter.count(storage)
    del value, storage
    counter.peak = counter.live
    with counter:
        step(state)
    return counter.peak, state


def measured_footprints(folder, footprints):
    """Most memory of this rank during a step after the first, for several ways to run."""
    plain = diffusion_job(config(folder, "footprint", 1))
    out = []
    for way in footprints:
        made = config(
            folder, "footprint", way.zero_stage, {"zero_optimization": FOOTPRINT_SIZES}, precision=way.precision,
            global_batch_size=2 * way.micro_batch * way.accumulation, micro_batch_size=way.micro_batch,
            checkpoint_activations=way.checkpoint_activations,
        )  # fmt: skip
        made = replace(made, model=FOOTPRINT_MODEL, deepspeed=replace(made.deepspeed, offload_optimizer=way.offload))
        batches = [random_batch(FOOTPRINT_MODEL, way.micro_batch) for _ in range(way.accumulation)]

        def start(made=made, batches=batches):
            job = replace(
                plain, config=made, model=initial_model(made),
                objective=lambda net, b: training_loss(net, b, made, seed=0),
            )  # fmt: skip
            engine = build_engine(job, "cpu")
            engine.train_step(batches, 1e-3)
            gc.collect()
            return engine

        peak, engine = peak_bytes(start, lambda engine, batches=batches: engine.train_step(batches, 1e-3))
        engine.close()
        del engine
        gc.collect()
        out.append(peak)
    return out


@case
def footprint(folder):
    return measured_footprints(folder, FOOTPRINTS)


@case
def more_footprints(folder):
    return measured_footprints(folder, MORE_FOOTPRINTS)


@case
def precision(folder):
    """bf16: which parameters keep fp32, and the dtype of the clocks that the network sees."""
    made = config(folder, "precision", 2, precision="bf16")
    job = diffusion_job(made)
    engine = build_engine(job, "cpu")
    clocks = []
    features = dit.timestep_features

    def watched(t, count):
        clocks.append(str(t.dtype))
        return features(t, count)

    dit.timestep_features = watched
    result = engine.train_step([next(job.batches(0, engine))], 1e-3)
    dit.timestep_features = features
    out = {
        "clocks": sorted(set(clocks)),
        "kept": {n: str(v.dtype) for n, v in engine.kept.items()},
        "sharded": sorted({str(p.dtype) for p in engine.named.values()}),
        "masters": sorted({str(f.dtype) for _, f, *_ in engine.masters.shards()}),
        "loss": str(result.loss.dtype),
    }
    engine.close()
    return out


@case
def bad_batch(folder):
    """A NaN batch on one rank only: all ranks skip, nothing changes, the next step goes on."""
    out = {}
    for stage, kind in ((0, "fp32"), (2, "fp32"), (1, "bf16"), (3, "bf16")):
        job = diffusion_job(config(folder, f"bad-{stage}-{kind}", stage, precision=kind))
        engine = build_engine(job, "cpu")
        batches = job.batches(0, engine)
        engine.train_step([next(batches)], 1e-2)
        before = snapshot_pieces(engine.pieces())
        batch = dict(next(batches))
        if RANK == 1:
            batch["latents"] = torch.full_like(batch["latents"], float("nan"))
        skipped = float(engine.train_step([batch], 1e-2).skipped)
        after = snapshot_pieces(engine.pieces())
        same = [torch.equal(a.fields[k], b.fields[k]) for a, b in zip(before, after) for k in a.fields]
        good = float(engine.train_step([next(batches)], 1e-2).skipped)
        stayed = [torch.equal(a.fields["param"], p.fields["param"]) for a, p in zip(after, engine.pieces())]
        # under ZeRO 0 the second rank writes no pieces
        moved = not all(stayed) or (stage == 0 and RANK > 0)
        out[f"{stage}-{kind}"] = {"skipped": skipped, "same": all(same), "next": good, "moved": moved}
        engine.close()
    return out


@case
def bad_after_resume(folder):
    """ZeRO 3, some parameters small enough to stay whole: a NaN batch right after a resume, beside an unbroken run."""
    out = {}
    for kind in ("fp32", "bf16"):
        ends = []
        for broken in (False, True):
            name = f"bad-after-resume-{kind}-{broken}"
            made = config(folder, name, 3, {"zero_optimization": {"stage3_param_persistence_threshold": 200}},
                          precision=kind)  # fmt: skip
            checkpoints = Checkpoints(folder / name / "checkpoints", keep=1, rank=RANK, world_size=2, timeout_s=60)
            job = diffusion_job(made)
            engine, skipped = build_engine(job, "cpu"), []
            batches = job.batches(0, engine)
            for step in range(5):
                if broken and step == 2:
                    engine.save(checkpoints, step, {})
                    checkpoints.wait()
                    dist.barrier()
                    engine.close()
                    engine = build_engine(diffusion_job(made), "cpu")
                    engine.load(checkpoints.folder(step))
                batch = dict(next(batches))
                if step == 2:
                    batch["latents"] = torch.full_like(batch["latents"], float("nan"))
                skipped.append(float(engine.train_step([batch], 1e-2).skipped))
            ends.append(snapshot_pieces(engine.pieces()))
            engine.close()
        same = [torch.equal(a.fields[key], b.fields[key]) for a, b in zip(*ends, strict=True) for key in a.fields]
        out[kind] = {"skipped": skipped, "same": all(same), "fields": len(same)}
    return out


@case
def averages(folder):
    """Inside ema_weights the network's forward pass uses the averages; outside the weights, to the bit."""
    out = {}
    for stage in range(4):
        overrides = NOT_PERSISTENT if stage == 3 else None
        job = diffusion_job(config(folder, f"averages-{stage}", stage, overrides))
        engine = build_engine(job, "cpu")
        batches = job.batches(0, engine)
        for _ in range(3):
            engine.train_step([next(batches)], 1e-2)
        before = snapshot_pieces(engine.pieces())
        plain, shown = job.evaluate(engine), engine.export()
        same = all(
            torch.equal(a.fields[k], b.fields[k]) for a, b in zip(before, engine.pieces()) for k in a.fields
        )
        again = job.evaluate(engine)
        out[stage] = {"first": plain, "second": again, "same": same}
        if RANK == 0:
            alone = diffusion_job(tiny_config(folder / "data", folder / "alone"))
            alone.model.load_state_dict(shown)
            parts = {"optimizer": alone.optimizer, "train": alone.train, "device": torch.device("cpu")}
            out[stage]["exported"] = alone.evaluate(TorchEngine(alone.model, alone.objective, **parts))["loss"]
        engine.close()
    return out


@case
def judged(folder):
    """Figures of 21 generated images under ZeRO 3: micro-batches of 4, the last rank draws some in vain."""
    settings = {"max_steps": 4, "micro_batch_size": 4, "eval_every": 4, "eval_images": 21, "eval_features": "digits"}
    made = config(folder, "judged", 3, NOT_PERSISTENT, eval_reference=str(folder / "reference.npz"), **settings)
    rows = run_train(made, device="cpu", progress=False, decode=pixels).metrics
    return [row for row in rows if row["kind"] == "evaluation"]


@case
def pre_emption(folder):
    """A signal to one rank, or the file STOP: all save the same step and end with 75."""
    out = {}
    Stop.look_every_s = 0.0
    for cause in ("SIGTERM", "SIGUSR1", "STOP"):
        made = config(folder, f"pre-emption-{cause}", 2, max_steps=400)
        ask = {
            "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
            "SIGUSR1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
            "STOP": Path(made.run.out, "STOP").touch,
        }[cause]
        if RANK == 1:
            threading.Thread(target=lambda made=made, ask=ask: after_steps(made, ask)).start()
        result = train(made)
        said = [row["message"] for row in result.metrics if row["kind"] == "event"]
        out[cause] = {"exit_code": result.exit_code, "step": result.step, "said": said}
    return out


@case
def disk_full(folder):
    """A rank that cannot write its part: every rank stops with an error, the previous checkpoint stays."""
    made = config(folder, "disk-full", 2, checkpoint_every=2, max_steps=8)
    write = interface.write_pieces

    def full(path, pieces):
        write(path, pieces)
        if RANK == 1 and "00000004" in str(path):
            raise OSError(28, "No space left on device")

    interface.write_pieces = full
    try:
        train(made)
    except OSError as error:
        message = str(error)
    else:
        message = ""
    finally:
        interface.write_pieces = write
    dist.barrier()
    return message


@case
def host_reads(folder):
    """Reads of device values by the host during a step: by DeepSpeed and torch, and by our code."""
    import deepspeed
    import sfd_kernels
    from torch.utils._python_dispatch import TorchDispatchMode

    import sfd_fast

    packages = {"deepspeed": deepspeed, "sfd_fast": sfd_fast, "sfd_kernels": sfd_kernels}
    owners = {name: str(Path(package.__file__).parent) for name, package in packages.items()}

    class Reads(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = {}

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                files = [frame.filename for frame in reversed(traceback.extract_stack())]
                owner = next(o for f in files for o, folder in owners.items() if f.startswith(folder))
                self.found[owner] = self.found.get(owner, 0) + 1
            return function(*args, **(kwargs or {}))

    out = {}
    for stage, kind, size in (
        (1, "parity", 4), (1, "parity", 2), (2, "bf16", 4), (2, "bf16", 2), (3, "bf16", 4), (3, "bf16", 2),
    ):  # fmt: skip
        name = f"ZeRO {stage}, {kind}, {4 // size} micro-batches"
        settings = {"precision": kind, "micro_batch_size": size}
        job = diffusion_job(config(folder, f"reads-{stage}-{kind}-{size}", stage, **settings))
        engine = build_engine(job, "cpu")
        batches = (micro_batches(batch, size) for batch in job.batches(0, engine))
        for _ in range(2):  # ZeRO 3 compares the order of modules among ranks in the first passes
            engine.train_step(next(batches), 1e-3)
        batch = next(batches)
        with Reads() as reads:
            engine.train_step(batch, 1e-3)
        out[name] = reads.found
        engine.close()
    return out


@case
def options(folder):
    """Offload and activation checkpointing beside the plain run of the same stage.

    torch.compile under ZeRO 1 and 2 takes minutes to compile: benchmarks/soak.py compares its losses.
    """
    out = {}
    for name, stage, engine_options, train_options in (
        ("plain-2", 2, {}, {}),
        ("offload-2", 2, {"offload_optimizer": True}, {}),
        ("plain-3", 3, {}, {}),
        ("offload-3", 3, {"offload_optimizer": True, "offload_parameters": True}, {}),
        ("checkpointing-3", 3, {}, {"checkpoint_activations": 1.0}),
    ):
        made = config(folder, f"options-{name}", stage, NOT_PERSISTENT if stage == 3 else None, **train_options)
        made = replace(made, deepspeed=replace(made.deepspeed, **engine_options))
        out[name] = losses(train(made))
    return out


def with_averages(made):
    """A second, shorter average and a warm-up of both."""
    return replace(made, optimizer=replace(made.optimizer, extra_ema_decays=(0.5,), ema_warmup=True))


def handed_over(folder, source, target, step):
    """A run directory `target` that begins with a checkpoint of `source`."""
    if RANK == 0:
        place = folder / target / "checkpoints"
        place.mkdir(parents=True)
        (place / f"{step:08d}").symlink_to(folder / source / "checkpoints" / f"{step:08d}")
        (place / "latest").write_text(f"{step:08d}")
    if dist.is_initialized():
        dist.barrier()


@case
def from_one(folder):
    """Two ranks take over what one saved: every field of every piece against that rank's file; then they go on."""
    made = with_averages(config(folder, "one", 1, max_steps=8))
    saved = load_file(folder / "one" / "checkpoints" / "00000004" / "state-00000.safetensors")
    worst, covered = {}, {}
    for stage in (1, 2, 3):
        job = diffusion_job(replace(made, deepspeed=replace(made.deepspeed, zero_stage=stage)))
        engine = build_engine(job, "cpu")
        engine.load(folder / "one" / "checkpoints" / "00000004")
        for piece in engine.pieces():
            for field, value in piece.fields.items():
                if value.dim():
                    wanted = saved[f"{piece.name}|{field}"][piece.start : piece.stop]
                    worst[field] = max(worst.get(field, 0.0), float((value - wanted).abs().max()))
                    covered[field] = covered.get(field, 0) + value.numel()
        engine.close()
    handed_over(folder, "one", "one-by-two", 4)
    went_on = train(with_averages(config(folder, "one-by-two", 2, max_steps=8)))
    return {"worst": worst, "covered": covered} | figures(went_on)


@case
def two(folder):
    """A run of two ranks under ZeRO 3, stopped after 4 of 8 steps, for one rank to go on with."""
    stopped_at(3, with_averages(config(folder, "two", 3, NOT_PERSISTENT, max_steps=8)))
    return figures(train(with_averages(config(folder, "two-unbroken", 3, NOT_PERSISTENT, max_steps=8))))


@case
def one(folder):
    """A run of one rank, checkpoints at 4 and 8."""
    return figures(train(with_averages(config(folder, "one", 1, max_steps=8, checkpoint_every=4))))


@case
def fp16(folder):
    """From a loss scale far too high: more overflows in a row than bad steps are allowed, with and without sums."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True  # torch computes it in software; DeepSpeed asks for hardware
    out = {}
    for stage, size in ((1, 0), (2, 4)):
        scale = {"fp16": {"initial_scale_power": 24, "hysteresis": 1}}
        settings = {"max_steps": 16, "max_bad_steps": 3, "micro_batch_size": size, "precision": "fp16"}
        result = train(config(folder, f"fp16-{stage}", stage, scale, **settings))
        rows = [row for row in result.metrics if row["kind"] == "train"]
        out[stage] = figures(result) | {"skipped": rows[-1]["skipped"]}
    return out


@case
def from_two(folder):
    """One rank takes over what two saved, compares every element with their files, and finishes the run."""
    made = with_averages(config(folder, "two", 1, max_steps=8))
    latest = folder / "two" / "checkpoints" / (folder / "two" / "checkpoints" / "latest").read_text()
    parts = [load_file(path) for path in sorted(latest.glob("state-*.safetensors"))]
    job = diffusion_job(made)
    engine = build_engine(job, "cpu")
    engine.load(latest)
    worst, covered = {}, {}
    for piece in engine.pieces():
        for field, value in piece.fields.items():
            if value.dim():
                key = f"{piece.name}|{field}"
                wanted = torch.cat([part[key] for part in parts if key in part])
                worst[field] = max(worst.get(field, 0.0), float((value - wanted).abs().max()))
                covered[field] = covered.get(field, 0) + value.numel()
    engine.close()
    return {"worst": worst, "covered": covered, "ranks": len(parts)} | figures(train(made))


@case
def contradictions(folder):
    """Configurations that do not fit, and a checkpoint of another model."""
    def message(made):
        try:
            train(made)
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    plain = config(folder, "contradictions", 1)
    other = replace(with_averages(config(folder, "one", 1, max_steps=16)), model=replace(MODEL, depth=3))
    elsewhere = config(folder, "one" if RANK == 0 else "nowhere", 1, max_steps=16)
    (folder / "in-the-way").touch()
    kept = (folder / "one" / "deepspeed.json").read_text()
    return {
        "world size": message(config(folder, "contradictions", 1, global_batch_size=9)),
        "micro batch": message(config(folder, "contradictions", 1, global_batch_size=12, micro_batch_size=4)),
        "stage": message(config(folder, "contradictions", 0, precision="bf16")),
        "optimizer": message(replace(plain, optimizer=OptimizerConfig(name="torch_fused"))),
        "file": message(config(folder, "contradictions", 1, {"gradient_clipping": 1.0})),
        "preset": message(other),
        "different disks": message(with_averages(elsewhere)),
        "other settings": message(replace(plain, optimizer=replace(plain.optimizer, lr=1e-3 / (1 + RANK)))),
        "other seed": message(replace(plain, train=replace(plain.train, seed=RANK))),
        "other data": message(with_data(plain, path=str(folder / ("other" if RANK else "data")))),
        "unwritable": message(config(folder, "in-the-way/run", 1)),
        "json as before": str((folder / "one" / "deepspeed.json").read_text() == kept),
        "watchdogs": str(sum(thread.name == "watchdog" for thread in threading.enumerate())),
    }


@case
def dies(folder):
    """Rank 1 kills itself in the middle of the run."""
    made = config(folder, "dies", 2, max_steps=100_000)
    if RANK == 1:
        threading.Thread(target=lambda: after_steps(made, lambda: os.kill(os.getpid(), signal.SIGKILL))).start()
    return train(made).exit_code


@case
def hangs(folder):
    """Rank 1 stops answering: its data never comes."""
    made = config(folder, "hangs", 2, max_steps=100_000)
    made = replace(made, deepspeed=replace(made.deepspeed, timeout_s=4))
    if RANK == 1:
        from sfd_fast.training import diffusion

        loader = diffusion.LatentLoader

        class Stuck(loader):
            def __iter__(self):
                yield from itertools.islice(super().__iter__(), 3)
                (folder / "hangs-from").write_text(str(time.time()))
                time.sleep(600)

        diffusion.LatentLoader = Stuck
    return train(with_data(made)).exit_code


def main() -> None:
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    folder, *names = arguments
    folder = Path(folder)
    torch.set_num_threads(1)
    for name in names:
        start = time.monotonic()
        try:
            result = CASES[name](folder)
        except Exception as error:
            (folder / f"{name}.{RANK}.json").write_text(json.dumps({"error": traceback.format_exc()}))
            print(f"rank {RANK}, case {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            raise
        result = {"result": result, "seconds": time.monotonic() - start}
        (folder / f"{name}.{RANK}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
