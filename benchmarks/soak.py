"""The long proofs of training: `make soak` (about an hour on two cores, 21 GiB) writes results/soak.json.

    losses      two gloo ranks under ZeRO 0 to 3 against one plain process, 30 steps
    shares      bytes of weights, gradients, moments and average of a rank under ZeRO 3
    planner     predicted against measured memory of two-rank runs
    reads       reads of device values by the host during a step
    compile     torch.compile under ZeRO 1 and 2 against the same without
    crashes     work that ends at its n-th file event, for every n: training, a model, samples, a cache; started again
    kills       20 runs of two ranks, each killed (-9) at a random moment, resumed, against runs never killed
    xxl         two training steps of XXL (1p0B) at its real size under ZeRO 3 on two ranks, against the reference path

One row for each: name, value, unit, bar, holds. `--only NAME ...` runs some and keeps the other rows.
"""

# ruff: noqa: I001 (soak_ranks comes before torch's neighbours: it makes the helpers of tests/ importable)

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from soak_ranks import TESTS, launch, row

import torch
from harness.deepspeed_ranks import FOOTPRINTS, MORE_FOOTPRINTS, build_engine, config, losses
from soak_kills import KILLS, compare_kills
from soak_xxl import SMALL, compare_xxl
from timing import machine
from harness.tiny_run import tiny_config, write_data
from sfd_fast.training.diffusion import diffusion_job
from sfd_fast.training.diffusion import run_train

RESULTS = Path(__file__).resolve().parent / "results" / "soak.json"


def cases(folder: Path, *names: str) -> dict[str, list]:
    """Cases of tests/harness/deepspeed_ranks.py on two ranks: by name the result of each rank."""
    launch(2, TESTS / "harness" / "deepspeed_ranks.py", folder, *names)
    return {
        name: [json.loads((folder / f"{name}.{rank}.json").read_text())["result"] for rank in (0, 1)] for name in names
    }


def compare_losses(folder: Path) -> list[dict]:
    settings = tiny_config(folder / "data", folder / "alone", max_steps=30, log_every=1, validate_every=15)
    settings = replace(settings, train=replace(settings.train, micro_batch_size=4))
    alone = losses(run_train(settings, device="cpu", progress=False))
    stages = cases(folder, "stages")["stages"][0]
    rows = []
    for stage in (0, 1, 2, 3):
        worst = max(abs(a / b - 1) for a, b in zip(stages[str(stage)]["losses"], alone, strict=True))
        name = f"two ranks, ZeRO {stage}: worst loss of 30 steps against one process"
        rows.append(row(name, worst, "relative", 1e-5, worst <= 1e-5))
    return rows


def compare_shares(folder: Path) -> list[dict]:
    measured = cases(folder, "shares")["shares"]
    launch(1, TESTS / "harness" / "deepspeed_ranks.py", folder, "shares_of_one")
    alone = json.loads((folder / "shares_of_one.0.json").read_text())["result"]
    share = max(sum(m.values()) / sum(alone.values()) for m in measured)
    name = "ZeRO 3 on two ranks: weights, gradients, moments and average of a rank"
    note = f"{sum(measured[0].values())} bytes against {sum(alone.values())} of the same engine on one rank"
    return [row(name, share, "of one rank's", 0.52, share <= 0.52, note)]


def compare_planner(folder: Path) -> list[dict]:
    found = cases(folder, "footprint", "more_footprints")
    rows = []
    for ways, measured in ((FOOTPRINTS, found["footprint"]), (MORE_FOOTPRINTS, found["more_footprints"])):
        for way, *peaks in zip(ways, *measured):
            error = max(abs(way.predicted() / peak - 1) for peak in peaks)
            rows.append(row(f"planner, {way}: peak of memory", error, "relative", 0.1, error <= 0.1))
    return rows


def compare_reads(folder: Path) -> list[dict]:
    found = [reads for rank in cases(folder, "host_reads")["host_reads"] for reads in rank.items()]
    ours = max(sum(count for owner, count in reads.items() if owner != "deepspeed") for _, reads in found)
    theirs = "; ".join(f"{way} {reads['deepspeed']}" for way, reads in found[: len(found) // 2])
    return [row("host reads of our code in a step", ours, "reads", 0, ours == 0, f"DeepSpeed's own: {theirs}")]


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
            out[f"{stage}-{compile} graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            torch._dynamo.utils.counters.clear()
            engine.close()
            torch._dynamo.reset()
    (folder / f"compile.{os.environ['RANK']}.json").write_text(json.dumps(out))


def compare_compile(folder: Path) -> list[dict]:
    launch(2, __file__, "--compiled-rank", folder)
    found = json.loads((folder / "compile.0.json").read_text())
    rows = []
    for stage in (1, 2):
        pairs = zip(found[f"{stage}-False"], found[f"{stage}-True"])
        worst = max(abs(a / b - 1) for a, b in pairs)
        name = f"torch.compile under ZeRO {stage}: worst loss of 5 steps"
        graphs, none = found[f"{stage}-True graphs"], found[f"{stage}-False graphs"]
        holds = worst <= 1e-5 and graphs > 0 and none == 0
        rows.append(row(name, worst, "relative", 1e-5, holds, f"{graphs} graphs were compiled"))
    return rows


def compare_crashes(folder: Path) -> list[dict]:
    """Every point at which a process can end while it writes; see tests/harness/crash_points.py."""
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    rows, points = [], 0
    for part in ("train", "export", "sample", "encode"):
        command = [sys.executable, str(TESTS / "harness" / "crash_points.py"), part, str(folder / part), "1"]
        said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(said.splitlines()[-1])
        points += found["points"]
        wrong = len(found["wrong"])
        name = f"{part} ended at each of its {found['points']} file events and started again: another outcome"
        rows.append(row(name, wrong, "outcomes", 0, wrong == 0, f"at {found['wrong']}" if wrong else ""))
    return [*rows, row("file events at which work was ended", points, "events", 300, points >= 300)]


PARTS = {
    "losses": compare_losses, "shares": compare_shares, "planner": compare_planner, "reads": compare_reads,
    "compile": compare_compile, "crashes": compare_crashes, "kills": compare_kills, "xxl": compare_xxl,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--json", type=Path, default=None, help="a further place for the rows")
    parser.add_argument("--small", action="store_true", help="the xxl part with a small network, printed and not kept")
    parser.add_argument("--kills", type=int, default=KILLS, help=argparse.SUPPRESS)
    parser.add_argument("--compiled-rank", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.compiled_rank:
        compiled_ranks(options.compiled_rank)
        return
    if options.small:
        with tempfile.TemporaryDirectory() as folder:
            for made in compare_xxl(Path(folder), SMALL, "small"):
                show(made)
        return
    parts = PARTS | {"kills": partial(compare_kills, kills=options.kills)}
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder) / "data")
            start = time.monotonic()
            made = [r | {"part": name} | machine("cpu") for r in parts[name](Path(folder))]
        rows = [r for r in rows if r["part"] != name] + made
        for r in made:
            show(r)
        print(f"  {name}: {time.monotonic() - start:.0f} s", flush=True)
        rows.sort(key=lambda r: list(PARTS).index(r["part"]))
        for place in filter(None, (RESULTS, options.json)):
            place.parent.mkdir(exist_ok=True)
            place.write_text(json.dumps(rows, indent=1) + "\n")
    if any(r["holds"] is False for r in rows):
        raise SystemExit("a bar does not hold")


def show(row: dict) -> None:
    mark = {True: "holds", False: "FAILS", None: ""}[row["holds"]]
    print(f"{row['name']}: {row['value']:.4g} {row['unit']} (bar {row['bar']}) {mark}", flush=True)
    if "note" in row:
        print(f"    {row['note']}", flush=True)


if __name__ == "__main__":
    main()
