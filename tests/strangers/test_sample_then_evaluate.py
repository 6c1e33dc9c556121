"""What `sfd sample` wrote is what `sfd evaluate` reads: the folder itself, in every format."""

import json

import numpy as np
import pytest
from harness.tiny_pipelines import build

from sfd_fast import cli


@pytest.mark.parametrize("format", ["png", "webp", "npz"])
def test_the_folder_of_samples_is_evaluated(tmp_path, capsys, format):
    build().save_pretrained(tmp_path / "model")
    reference = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=reference)
    out = tmp_path / "samples"
    cli.main(["sample", "--model", str(tmp_path / "model"), "--out", str(out), "--num_images", "12", "--format", format,
              "--grid", "9", "--show-stages", "--device", "cpu", "--progress", "false"])  # fmt: skip
    assert (out / "grid.png").is_file() and (out / "stages.png").is_file()
    (out / "images").mkdir(exist_ok=True)
    (out / "images" / "._000000.png").write_bytes(b"what macOS leaves beside every file")
    cli.main(["evaluate", "--samples", str(out), "--reference", str(tmp_path / "reference.npz"), "--features", "digits",
              "--output", str(tmp_path / "metrics.json"), "--progress", "false", "--device", "cpu"])  # fmt: skip
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert (report["samples"]["num_images"], report["samples"]["height"]) == (12, 8)
    assert np.isfinite(report["metrics"]["fd_digits"])
