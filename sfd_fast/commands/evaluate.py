"""`sfd evaluate`: generated images against a reference, as metrics.json and a table."""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from sfd_fast.config import require
from sfd_fast.config.checks import Count, FilePath
from sfd_fast.config.evaluation import EvaluatorConfig
from sfd_fast.files.atomic import write_atomically
from sfd_fast.files.documents import read_json
from sfd_fast.files.overwrite import require_free
from sfd_fast.ranks import Ranks

MEANINGS = {
    "fid": "Frechet Inception distance, lower is better",
    "sfid": "the same on spatial features, lower is better",
    "inception_score": "Inception Score, higher is better",
    "precision": "share of samples near real images, higher is better",
    "recall": "share of real images near samples, higher is better",
    "kid": "kernel Inception distance, lower is better",
    "fd_dinov2": "Frechet distance of DINOv2 features, lower is better",
    "kd_dinov2": "kernel distance of DINOv2 features, lower is better",
    "fd_digits": "Frechet distance of 8 x 8 pixels, lower is better",
    "kd_digits": "kernel distance of 8 x 8 pixels, lower is better",
}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvaluatorConfig):
    """Options of `sfd evaluate`."""

    samples: FilePath
    """npz with arr_0 (N, H, W, 3) uint8, a folder of images, or the folder that `sfd sample` wrote"""
    output: FilePath = "metrics.json"
    num_images: Count | None = None
    """only the first of them (a folder is in a fixed random order)"""


def run_evaluate(config: EvaluateConfig) -> dict:
    """Evaluate config.samples against config.reference; write config.output, print a table, and return what was
    written.

    Under torchrun, or in a process group, every rank extracts a share of the images and rank 0 writes. Raises
    ValueError for anything wrong with the images, the reference or the weights, OSError for an output that cannot be
    written, before anything is computed.
    """
    ranks = Ranks.join()
    with ranks.together():
        return evaluated(config, ranks)


def evaluated(config: EvaluateConfig, ranks: Ranks) -> dict:
    import torch

    from sfd_fast.evaluation.evaluator import Evaluator
    from sfd_fast.evaluation.images import open_images

    ranks.on_first(lambda: check_writable(Path(config.output), config.overwrite))
    if ranks.world_size > 1:
        ranks.device(config.device)
    samples = open_images(config.samples, num_workers=config.num_workers)
    num_images = samples.num_images if config.num_images is None else config.num_images
    require(
        2 <= num_images <= samples.num_images,
        f"{config.samples} has {samples.num_images} images, of which {num_images} are to be used: at least 2 are "
        "needed",
    )
    evaluator = Evaluator(config)
    evaluator.feed(samples, evaluator.update, label="samples", stop=num_images)
    metrics = evaluator.compute()
    report = {
        "metrics": metrics,
        "skipped": evaluator.skipped,
        "warnings": evaluator.warnings,
        "samples": samples.describe() | {"num_images": num_images},
        **evaluator.record,
        "settings": {
            name: value
            for name, value in asdict(config).items()
            if name not in ("samples", "reference", "output", "progress")
        },
        "torch": torch.__version__,
        "device": str(evaluator.device),
    }
    if ranks.first:
        print(format_report(report), flush=True)  # first: what took an hour is not lost to a full disk
        content = json.dumps(report, indent=2) + "\n"
        write_atomically(Path(config.output), content)
        print(f"written to {config.output}")
    return report


def is_report(path: Path) -> bool:
    """Whether a file is a report of this command."""
    return {"metrics", "samples", "settings", "torch", "device"} <= read_json(path).keys()


def check_writable(output: Path, overwrite: bool) -> None:
    """Raises OSError where the report could not be written at the end, ValueError over a file of someone else."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise OSError(f"--output {output} cannot be written ({error}): choose another file") from error
    require_free(output, is_report, overwrite=overwrite)


def format_report(report: dict) -> str:
    """The report as text: where the features came from, one line a metric, then what is missing and why."""
    metrics, samples, reference = report["metrics"], report["samples"], report["reference"]
    lines = [f"samples    {samples['path']} ({samples['num_images']} images, {samples['width']} x {samples['height']})"]
    lines.append(f"reference  {reference['path']} (statistics {reference['statistics']})")
    weights = report["weights"]
    if "sha256" in weights:
        state = "the published file" if weights["published"] else "NOT the published file"
        lines.append(f"weights    {weights['path']} (SHA-256 {weights['sha256']}, {state})")
    elif weights:
        lines.append(f"weights    {weights['path']}")
    lines += ["", f"{'metric':<16} {'value':>12} {'+-':>10}  meaning"]
    for name, value in metrics.items():
        if name.endswith("_std"):
            continue
        deviation = f"{metrics[name + '_std']:.5f}" if name + "_std" in metrics else ""
        lines.append(f"{name:<16} {value:>12.5f} {deviation:>10}  {MEANINGS[name]}")
    lines += [f"{name:<16} {'left out':>12} {'':>10}  {reason}" for name, reason in report["skipped"].items()]
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    return "\n".join(lines)
