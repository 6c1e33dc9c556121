"""The long proofs of training: `make soak` (fifteen minutes on two cores, 21 GiB) writes results/soak.json.

    losses      two gloo ranks under ZeRO 1, 2, 3 against one plain process, 30 steps
    shares      bytes of weights, gradients, moments and average of a rank under ZeRO 3
    planner     predicted against measured memory of two-rank runs
    compile     torch.compile under ZeRO 1 and 2 against the same without
    kills       20 runs of two ranks, each killed (-9) at a random moment, resumed, against one never killed
    xxl         two training steps of XXL (1p0B) at its real size under ZeRO 3 on two ranks, against the reference path

One row for each: name, value, unit, bar, holds. `--only NAME ...` runs some and keeps the other rows.
"""

import argparse
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
sys.path[:0] = [str(TESTS)]

from deepspeed_ranks import (  # noqa: E402
    FOOTPRINT_MODEL,
    FOOTPRINT_SIZES,
    FOOTPRINTS,
    build_engine,
    config,
    losses,
    training_loss,
)
from safetensors.torch import load_file  # noqa: E402
from sfd_kernels import reference_only  # noqa: E402
from tiny_run import tiny_config, write_data  # noqa: E402

from sfd_fast.config import (  # noqa: E402
    DeepSpeedConfig,
    ModelConfig,
    OptimizerConfig,
    SFDConfig,
    TrainConfig,
    TransportConfig,
)
from sfd_fast.models.dit import LightningDiT  # noqa: E402
from sfd_fast.presets import XXL  # noqa: E402
from sfd_fast.training.deepspeed import LostRankError  # noqa: E402
from sfd_fast.training.diffusion import diffusion_job  # noqa: E402
from sfd_fast.training.job import Job  # noqa: E402
from sfd_fast.training.loop import run_train  # noqa: E402
from sfd_fast.training.plan import memory  # noqa: E402

RESULTS = HERE / "results" / "soak.json"
KILLS = 20
XXL_NEEDS_GIB = 21
XXL_SIZES = {
    "reduce_bucket_size": 20_000_000, "stage3_prefetch_bucket_size": 20_000_000,
    "stage3_max_live_parameters": 80_000_000, "stage3_max_reuse_distance": 80_000_000, "sub_group_size": 100_000_000,
}  # fmt: skip
"""small buckets: two ranks share the memory of one small machine"""


def row(name: str, value: float, unit: str, bar: float | None, holds: bool | None, note: str = "") -> dict:
    made = {"name": name, "value": value, "unit": unit, "bar": bar, "holds": holds}
    return made | {"note": note} if note else made


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(world_size: int, *arguments: object) -> None:
    """The program on so many ranks, waited for. Raises RuntimeError with a rank's last words."""
    port = free_port()
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    ranks = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=os.environ | rank_environment(rank, world_size, port) | {"PYTHONPATH": path},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    words = [rank.communicate()[1] for rank in ranks]
    for rank, said in zip(ranks, words):
        if rank.returncode:
            raise RuntimeError(f"a rank ended with {rank.returncode}: {said[-3000:]}")


def case(folder: Path, name: str) -> list:
    """A case of tests/deepspeed_ranks.py on two ranks: the result of each."""
    launch(2, TESTS / "deepspeed_ranks.py", folder, name)
    return [json.loads((folder / f"{name}.{rank}.json").read_text())["result"] for rank in (0, 1)]


def compare_losses(folder: Path) -> list[dict]:
    settings = tiny_config(folder / "data", folder / "alone", max_steps=30, log_every=1, validate_every=15)
    settings = replace(settings, train=replace(settings.train, micro_batch_size=4))
    alone = losses(run_train(settings, device="cpu", progress=False))
    stages = case(folder, "stages")[0]
    rows = []
    for stage in (1, 2, 3):
        worst = max(abs(a / b - 1) for a, b in zip(stages[str(stage)]["losses"], alone, strict=True))
        name = f"two ranks, ZeRO {stage}: worst loss of 30 steps against one process"
        rows.append(row(name, worst, "relative", 1e-5, worst <= 1e-5))
    return rows


def compare_shares(folder: Path) -> list[dict]:
    measured = case(folder, "shares")
    share = max(sum(m["rank"].values()) / sum(m["one_rank"].values()) for m in measured)
    name = "ZeRO 3 on two ranks: weights, gradients, moments and average of a rank"
    return [row(name, share, "of one rank's", 0.52, share <= 0.52)]


def compare_planner(folder: Path) -> list[dict]:
    measured = case(folder, "footprint")[0]
    rows = []
    for (stage, precision, micro_batch, share), peak in zip(FOOTPRINTS, measured):
        predicted = memory(
            FOOTPRINT_MODEL, TransportConfig(), world_size=2, zero_stage=stage, micro_batch=micro_batch,
            checkpoint_activations=share, precision=precision, overlap=False, sizes=FOOTPRINT_SIZES,
        ).peak  # fmt: skip
        error = abs(predicted / peak - 1)
        name = f"planner, ZeRO {stage}, {precision}, micro-batch {micro_batch}, {share:.0%} recomputed: peak of memory"
        rows.append(row(name, error, "relative", 0.1, error <= 0.1))
    return rows


def compiled_ranks(folder: Path) -> None:
    """One rank: five losses under ZeRO 1 and 2, without and with torch.compile."""
    out = {}
    for stage in (1, 2):
        for compile in (False, True):
            job = diffusion_job(config(folder, f"compile-{stage}", stage, compile=compile))
            engine = build_engine(job, "cpu")
            batches = job.batches(0, engine)
            found = [engine.train_step([next(batches)], 1e-2).loss for _ in range(5)]
            out[f"{stage}-{compile}"] = [float(engine.mean_over_ranks(x)) for x in found]
            engine.close()
            torch._dynamo.reset()
    (folder / f"compile.{os.environ['RANK']}.json").write_text(json.dumps(out))


def compare_compile(folder: Path) -> list[dict]:
    launch(2, __file__, "--rank", "compile", "--folder", folder)
    found = json.loads((folder / "compile.0.json").read_text())
    rows = []
    for stage in (1, 2):
        pairs = zip(found[f"{stage}-False"], found[f"{stage}-True"])
        worst = max(abs(a / b - 1) for a, b in pairs)
        name = f"torch.compile under ZeRO {stage}: worst loss of 5 steps"
        rows.append(row(name, worst, "relative", 1e-5, worst <= 1e-5))
    return rows


# ------------------------------------------------------------------- kills


def kill_config(folder: Path, name: str) -> SFDConfig:
    """ZeRO 2 on two ranks, a checkpoint every other step: most of the time goes into writing them."""
    return config(folder, name, 2, max_steps=60, checkpoint_every=2, log_every=20)


def fork_ranks(made: SFDConfig) -> list[int]:
    """Two ranks as children of this process, which has imported everything already."""
    port = free_port()
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.environ.update(rank_environment(rank, 2, port))
                torch.set_num_threads(1)
                with open(os.devnull, "w") as nothing:
                    os.dup2(nothing.fileno(), 2)
                status = run_train(made, device="cpu", progress=False).exit_code
            except LostRankError:
                status = 3
            finally:
                os._exit(status)
        children.append(child)
    return children


def finish(children: list[int]) -> list[int]:
    return [os.waitpid(child, 0)[1] for child in children]


def killing(folder: Path) -> None:
    """KILLS runs, each killed once, resumed and compared with one that was not."""
    import deepspeed  # noqa: F401 (before the forks)

    assert finish(fork_ranks(kill_config(folder, "unbroken"))) == [0, 0]
    wanted = final_state(folder / "unbroken")
    draw = random.Random(0)
    out = []
    for number in range(KILLS):
        made = kill_config(folder, f"killed-{number}")
        children = fork_ranks(made)
        # a random step, then a random part of the time that a few steps and a checkpoint take
        wait_for_step(Path(made.train.out), draw.randrange(0, made.train.max_steps - 8, 2))
        time.sleep(draw.uniform(0.0, 0.15))
        victims = draw.choice([children[:1], children[1:], children])
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        ends = finish(children)
        killed = sum(os.WIFSIGNALED(end) for end in ends)
        attempts = 1
        while finish(fork_ranks(made)) != [0, 0]:
            attempts += 1
            if attempts > 3:
                break
        state = final_state(Path(made.train.out))
        same = state.keys() == wanted.keys() and all(torch.equal(state[k], wanted[k]) for k in wanted)
        out.append({"killed": killed, "ranks": len(victims), "same": same})
    (folder / "kills.json").write_text(json.dumps(out))


def wait_for_step(run: Path, step: int) -> None:
    """Returns when the run's newest checkpoint is of that step or later; 0 is the start, before any checkpoint."""
    pointer, deadline = run / "checkpoints" / "latest", time.monotonic() + 120
    while step and time.monotonic() < deadline:
        if pointer.is_file() and int(pointer.read_text()) >= step:
            return
        time.sleep(0.002)


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every rank's last state, and the exported model."""
    found = {}
    latest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    for path in [*sorted(latest.glob("*.safetensors")), run / "model" / "model.safetensors"]:
        found |= {f"{path.name}:{name}": value for name, value in load_file(path).items()}
    return found


def compare_kills(folder: Path) -> list[dict]:
    launch(1, __file__, "--rank", "kills", "--folder", folder)
    found = json.loads((folder / "kills.json").read_text())
    same, killed = sum(f["same"] for f in found), sum(f["killed"] > 0 for f in found)
    note = f"{killed} runs were alive when killed; {sum(f['ranks'] == 1 for f in found)} lost one rank, the others both"
    holds = same == KILLS and killed == KILLS
    return [row(f"runs of two ranks killed at random, same final bits, of {KILLS}", same, "runs", KILLS, holds, note)]


# --------------------------------------------------------------------- xxl


def xxl_config(model: ModelConfig, out: Path) -> SFDConfig:
    overrides = out.parent / "xxl.json"
    overrides.write_text(json.dumps({"zero_optimization": XXL_SIZES}))
    return SFDConfig(
        model=model,
        optimizer=OptimizerConfig(lr=1e-4, moments="bf16", ema_decay=0.9),
        train=TrainConfig(
            out=str(out), engine="deepspeed", precision="fp32", global_batch_size=2, checkpoint_activations=1.0
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
        config=made, train=made.train, optimizer=made.optimizer, deepspeed=made.deepspeed, model=network,
        objective=lambda net, batch: training_loss(net, batch, made, seed=0),
        terms=("repa", "velocity", "cosine"), batches=lambda start, engine: iter(()), export=lambda *a: None,
    )  # fmt: skip
    engine = build_engine(job, "cpu")
    found, seconds = [], []
    for step in range(2):
        start = time.monotonic()
        result = engine.train_step([xxl_batch(model, [2 * step + rank])], 1e-4)
        found.append(float(engine.mean_over_ranks(result.loss)))
        seconds.append(time.monotonic() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peaks = [float(x) for x in engine.sum_over_ranks(torch.tensor([peak / 2**30], dtype=torch.float64))]
    out = {"losses": found, "seconds": seconds, "gib": peaks[0], "skipped": float(result.skipped)}
    (folder / f"xxl.{rank}.json").write_text(json.dumps(out))
    engine.close()


def xxl_reference(folder: Path, model: ModelConfig) -> None:
    """The same two steps in plain PyTorch: references instead of kernels, torch's AdamW, no sharding."""
    made = xxl_config(model, folder / "reference")
    network = xxl_network(made)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    found = []
    with reference_only():
        for step in range(2):
            total = 0.0
            for number in (2 * step, 2 * step + 1):
                loss, _ = training_loss(network, xxl_batch(model, [number]), made, seed=0)
                total += float(loss) / 2
                if step == 0:
                    (loss / 2).backward()
            found.append(total)
            if step == 0:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    (folder / "reference.json").write_text(json.dumps(found))


def available_gib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 2**20


def compare_xxl(folder: Path, model: ModelConfig = XXL, name: str = "XXL") -> list[dict]:
    if model is XXL and available_gib() < XXL_NEEDS_GIB:
        raise RuntimeError(f"XXL needs {XXL_NEEDS_GIB} GiB of free memory; {available_gib():.1f} GiB are available")
    small = [] if model is XXL else ["--small"]
    launch(2, __file__, "--rank", "xxl", "--folder", folder, *small)
    ours = json.loads((folder / "xxl.0.json").read_text())
    launch(1, __file__, "--rank", "reference", "--folder", folder, *small)
    reference = json.loads((folder / "reference.json").read_text())
    errors = [abs(a / b - 1) for a, b in zip(ours["losses"], reference)]
    note = (
        f"losses {ours['losses']} against {reference}; fp32 weights, bf16 moments, fp32 average, micro-batch 1, all "
        f"blocks recomputed; {ours['seconds'][1]:.0f} s for the second step"
    )
    moved = abs(ours["losses"][1] - ours["losses"][0])
    return [
        row(f"{name}, ZeRO 3 on two ranks: loss of step 1 against the reference path", errors[0], "relative", 1e-3,
            errors[0] <= 1e-3, note),
        row(f"{name}, ZeRO 3 on two ranks: loss of step 2, after an update", errors[1], "relative", 1e-3,
            errors[1] <= 1e-3 and ours["skipped"] == 0 and moved > 0),
        row(f"{name}, ZeRO 3: memory of both ranks together", ours["gib"], "GiB", 24.0, ours["gib"] <= 24.0),
    ]  # fmt: skip


PARTS = {
    "losses": compare_losses, "shares": compare_shares, "planner": compare_planner, "compile": compare_compile,
    "kills": compare_kills, "xxl": compare_xxl,
}  # fmt: skip
SMALL = replace(XXL, hidden_size=256, depth=3, num_heads=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rank", choices=["compile", "kills", "xxl", "reference"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help="the xxl part with a small network, printed and not kept")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model = SMALL if arguments.small else XXL
    if arguments.rank:
        ranks = {"compile": compiled_ranks, "kills": killing}
        if arguments.rank in ranks:
            ranks[arguments.rank](arguments.folder)
        else:
            {"xxl": xxl_ranks, "reference": xxl_reference}[arguments.rank](arguments.folder, model)
        return
    if arguments.small:
        with tempfile.TemporaryDirectory() as folder:
            for made in compare_xxl(Path(folder), SMALL, "small"):
                print(made)
        return
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder) / "data")
            start = time.monotonic()
            made = [r | {"part": name} for r in PARTS[name](Path(folder))]
        rows = [r for r in rows if r["part"] != name] + made
        for r in made:
            mark = {True: "holds", False: "FAILS", None: ""}[r["holds"]]
            print(f"{r['name']}: {r['value']:.4g} {r['unit']} (bar {r['bar']}) {mark}", flush=True)
        print(f"  {name}: {time.monotonic() - start:.0f} s", flush=True)
        rows.sort(key=lambda r: list(PARTS).index(r["part"]))
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    if any(r["holds"] is False for r in rows):
        raise SystemExit("a bar does not hold")


if __name__ == "__main__":
    main()
