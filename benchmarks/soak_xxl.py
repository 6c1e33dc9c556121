"""Two training steps of XXL (1p0B) at its real size under ZeRO 3 on two ranks, against the reference path.

`python soak_xxl.py ranks|reference FOLDER full|small`: one rank, or the reference; results go to FOLDER.
"""

# ruff: noqa: I001 (soak_ranks comes before torch's neighbours: it makes the helpers of tests/ importable)

import json
import os
import resource
import sys
from dataclasses import replace
from pathlib import Path

from soak_ranks import launch, row

import torch
from harness.deepspeed_ranks import build_engine, training_loss
from sfd_kernels import reference_only
from sfd_fast.config import DeepSpeedConfig, ModelConfig, OptimizerConfig, RunConfig, SFDConfig, TrainConfig
from sfd_fast.models.dit import LightningDiT
from sfd_fast.config.presets import XXL
from sfd_fast.training.job import Job

SMALL = replace(XXL, hidden_size=256, depth=3, num_heads=4)
STEP = 0.3
"""rate of the step times width: large enough for one update to change the loss by more than a hundredth"""
XXL_NEEDS_GIB = 21
XXL_SIZES = {
    "reduce_bucket_size": 20_000_000, "stage3_prefetch_bucket_size": 20_000_000,
    "stage3_max_live_parameters": 80_000_000, "stage3_max_reuse_distance": 80_000_000, "sub_group_size": 10_000_000,
}  # fmt: skip
"""small buckets: two ranks share the memory of one small machine. With bf16 moments the optimizer runs as its reference
on a CPU, whose temporaries are about nine times a sub-group in fp32"""


def xxl_config(model: ModelConfig, out: Path) -> SFDConfig:
    overrides = out.parent / "xxl.json"
    overrides.write_text(json.dumps({"zero_optimization": XXL_SIZES}))
    return SFDConfig(
        model=model,
        optimizer=OptimizerConfig(lr=STEP / model.hidden_size, moments="bf16", ema_decay=0.9),
        run=RunConfig(out=str(out)),
        train=TrainConfig(
            engine="deepspeed", precision="fp32", global_batch_size=2, checkpoint_activations=1.0
        ),
        deepspeed=DeepSpeedConfig(zero_stage=3, config_file=str(overrides)),
    )


def xxl_network(made: SFDConfig) -> LightningDiT:
    """Seeded; the layers that start at zero get small weights, so that the first step moves every part."""
    torch.manual_seed(0)
    network = LightningDiT(made.model, checkpoint_activations=1.0)
    with torch.no_grad():
        for name, param in network.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                param.normal_(0, 0.02)
    return network


def xxl_batch(model: ModelConfig, ids: list[int]) -> dict[str, torch.Tensor]:
    side = model.grid_size
    samples = []
    for number in ids:
        draw = torch.Generator().manual_seed(number)
        latents = torch.randn(model.channels, side, side, generator=draw)
        samples.append((latents, torch.randn(model.num_tokens, model.repa_channels, generator=draw)))
    return {
        "latents": torch.stack([s[0] for s in samples]), "features": torch.stack([s[1] for s in samples]),
        "labels": torch.tensor(ids) % model.num_classes, "sample_ids": torch.tensor(ids),
    }  # fmt: skip


def xxl_ranks(folder: Path, model: ModelConfig) -> None:
    """One rank: two training steps, and what they cost."""
    rank = int(os.environ["RANK"])
    made = xxl_config(model, folder / f"xxl-{rank}")
    network = xxl_network(made)
    job = Job(
        config=made, model=network,
        objective=lambda net, batch: training_loss(net, batch, made, seed=0),
        terms=("repa", "velocity", "cosine"), batches=lambda start, engine: iter(()), export=lambda *a: None,
    )  # fmt: skip
    engine = build_engine(job, "cpu")
    found = []
    for step in range(2):
        result = engine.train_step([xxl_batch(model, [2 * step + rank])], made.optimizer.lr)
        found.append(float(engine.mean_over_ranks(result.loss)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peaks = [float(x) for x in engine.sum_over_ranks(torch.tensor([peak / 2**30], dtype=torch.float64))]
    out = {"losses": found, "gib": peaks[0], "skipped": float(result.skipped)}
    (folder / f"xxl.{rank}.json").write_text(json.dumps(out))
    engine.close()


def xxl_reference(folder: Path, model: ModelConfig) -> None:
    """The same two steps in plain PyTorch: references instead of kernels, torch's AdamW, no sharding. Also the second
    loss without the update, to tell how much that changes it.
    """
    made = xxl_config(model, folder / "reference")
    network = xxl_network(made)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=made.optimizer.lr, weight_decay=0.0)

    def mean_loss(step: int, backward: bool = False) -> float:
        total = 0.0
        for number in (2 * step, 2 * step + 1):
            loss, _ = training_loss(network, xxl_batch(model, [number]), made, seed=0)
            total += float(loss) / 2
            if backward:
                (loss / 2).backward()
        return total

    with reference_only():
        with torch.no_grad():
            unchanged = mean_loss(1)
        first = mean_loss(0, backward=True)
        optimizer.step()
        with torch.no_grad():
            second = mean_loss(1)
    (folder / "reference.json").write_text(json.dumps({"losses": [first, second], "unchanged": unchanged}))


def available_gib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 2**20


def compare_xxl(folder: Path, model: ModelConfig = XXL, name: str = "XXL") -> list[dict]:
    if model is XXL and available_gib() < XXL_NEEDS_GIB:
        raise RuntimeError(f"XXL needs {XXL_NEEDS_GIB} GiB of free memory; {available_gib():.1f} GiB are available")
    size = "full" if model is XXL else "small"
    launch(2, __file__, "ranks", folder, size)
    ours = json.loads((folder / "xxl.0.json").read_text())
    launch(1, __file__, "reference", folder, size)
    reference = json.loads((folder / "reference.json").read_text())
    errors = [abs(a / b - 1) for a, b in zip(ours["losses"], reference["losses"])]
    change = abs(reference["losses"][1] / reference["unchanged"] - 1)
    note = (
        f"losses {ours['losses']} against {reference['losses']}; fp32 weights, bf16 moments, fp32 average, micro-batch "
        "1, all blocks recomputed"
    )
    return [
        row(f"{name}, ZeRO 3 on two ranks: loss of step 1 against the reference path", errors[0], "relative", 1e-3,
            errors[0] <= 1e-3, note),
        row(f"{name}, ZeRO 3 on two ranks: loss of step 2, after an update", errors[1], "relative", 1e-3,
            errors[1] <= 1e-3 and ours["skipped"] == 0),
        row(f"{name}: how much that update changes the loss of step 2 (reference path)", change, "relative", 1e-2,
            change >= 1e-2, f"at least the bar, or the row before proves nothing; lr {STEP / model.hidden_size:.2g}"),
        row(f"{name}, ZeRO 3: memory of both ranks together", ours["gib"], "GiB", 24.0, ours["gib"] <= 24.0),
    ]  # fmt: skip


def main() -> None:
    part, folder, size = sys.argv[1:]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    {"ranks": xxl_ranks, "reference": xxl_reference}[part](Path(folder), XXL if size == "full" else SMALL)


if __name__ == "__main__":
    main()
