"""`~` stands for the home folder in every function that takes a path, as it does in every setting."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.tiny_pipelines import STATISTICS, build
from harness.tiny_run import MODEL, write_data
from PIL import Image

from sfd_fast.config import SFDConfig
from sfd_fast.files.home import expanded

ROOT = Path(__file__).resolve().parents[2] / "sfd_fast"
TEXT = {"write_atomically": "its content is text too", "link": "its names come from os.walk",
        "require_kinds": "the path is only named"}  # fmt: skip


def functions():
    """(place, function) of every public function of the package that takes a path as text."""
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
                arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                kinds = [ast.unparse(argument.annotation) for argument in arguments if argument.annotation]
                if any("str | Path" in kind or kind == "ReleasedSettings" for kind in kinds):
                    yield f"{file.relative_to(ROOT)}: {node.name}", node


def test_every_function_that_takes_a_path_as_text_expands_it():
    found = list(functions())
    assert len(found) > 60
    for place, node in found:
        marked = "with_home" in map(ast.unparse, node.decorator_list)
        assert marked != (node.name in TEXT), f"{place} takes a path without @with_home"


@pytest.mark.parametrize(
    ("given", "meant"),
    [("~/a", "/home/me/a"), ("~", "/home/me"), (Path("~/a"), Path("/home/me/a")), (["~/a", "b"], ["/home/me/a", "b"]),
     ("a/~", "a/~"), ("s3://a/~b", "s3://a/~b"), ("owner/name", "owner/name"), (Path("a"), Path("a")), (None, None),
     (3, 3), ((Path("~"),), (Path("/home/me"),)), ("", ""), (Path(), Path())],
)  # fmt: skip
def test_what_is_meant(monkeypatch, given, meant):
    monkeypatch.setenv("HOME", "/home/me")
    result = expanded(given)
    assert result == meant and type(result) is type(meant)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, and another folder to work in: nothing may appear there."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("of", [str, Path])
def test_pipelines_and_models_are_written_and_read(home, of):
    from sfd_fast import SFDPipeline, load_released
    from sfd_fast.formats.model_folder import read_config, save_model
    from sfd_fast.formats.released_model import convert_released, export_released, load_model
    from sfd_fast.models.dit import LightningDiT

    build(guide=None, guidance=None).save_pretrained(of("~/pipeline"))
    SFDPipeline.from_pretrained(of("~/pipeline"), device="cpu")
    save_model(of("~/model"), LightningDiT(MODEL), config=SFDConfig(model=MODEL))
    assert read_config(of("~/model")).model == load_model(of("~/model")).config == MODEL
    export_released(of("~/model"), of("~/model.pt"))
    load_released(of("~/model.pt"))
    convert_released(of("~/model.pt"), of("~/again"))
    assert {path.name for path in home.iterdir()} == {"pipeline", "model", "model.pt", "again"}


@pytest.mark.parametrize("of", [str, Path])
def test_caches_statistics_and_images_are_written_and_read(home, of):
    from sfd_fast.data.cache.describe import describe
    from sfd_fast.data.cache.shards import write_shard
    from sfd_fast.data.load.features import FeatureShards
    from sfd_fast.data.load.latents import LatentShards
    from sfd_fast.diffusion.statistics import LatentStatistics
    from sfd_fast.evaluation.images import open_images

    write_data(home / "cache")
    assert len(LatentShards(of("~/cache"))) == len(LatentShards([of("~/cache")])) == 40
    assert describe(of("~/cache")).texture_channels == 2
    STATISTICS.save(of("~/statistics"))
    assert LatentStatistics.load(of("~/statistics")).texture_channels == 4
    write_shard(of("~/f/a.safetensors"), {"feats_dino": torch.zeros(2, 3, 2, 2), "labels": torch.arange(2)})
    assert len(FeatureShards(of("~/f"))) == 2
    (home / "images").mkdir()
    for number in range(2):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(home / "images" / f"{number}.png")
    assert open_images(of("~/images")).num_images == 2
