"""A model remembers which of its classes it was trained on, from the cache's manifest into every folder of it."""

import pytest
import torch
from harness.tiny_run import tiny_config, write_data

from sfd_fast.data.cache.describe import CacheSizes
from sfd_fast.sampling.pipeline_folder import load_parts
from sfd_fast.sampling.sources import local_folder
from sfd_fast.training import diffusion
from sfd_fast.training.export import export_checkpoint


@pytest.mark.parametrize("seen", [(0, 1, 3), None])
def test_the_classes_of_a_cache_reach_the_pipeline(seen, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion, "describe", lambda *folders: CacheSizes(2, 2, 4, 5, seen, 8))
    diffusion.run_train(tiny_config(write_data(tmp_path / "data"), tmp_path / "run"), progress=False, device="cpu")
    export_checkpoint(tmp_path / "run", tmp_path / "exported")
    for folder in (tmp_path / "run", tmp_path / "exported"):
        found = load_parts(local_folder(folder), None, torch.nn.Identity(), None)["classes"]
        assert found == (seen and list(seen))
