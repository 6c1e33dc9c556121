"""Pipelines from the hub and the authors' weights in one step, against a stand-in of the hub on loopback."""

import json
import re

import numpy as np
import pytest
import torch
from harness.hub_stand_in import HubStandIn
from harness.tiny_pipelines import STATISTICS, build, drawn
from harness.tiny_released import EMA_ONLY, NETWORK, write_repositories

from sfd_fast.config import GuidanceConfig
from sfd_fast.config.presets import PRESETS
from sfd_fast.formats.released_model import load_released
from sfd_fast.formats.released_weights import CODEC_FILE, CODEC_REPOSITORY, REPOSITORY, checkpoint, published
from sfd_fast.sampling.pipeline import SFDPipeline
from sfd_fast.sampling.sources import local_folder, released_pipeline


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    found = write_repositories(root)
    build().save_pretrained(root / "pipeline")
    (root / "pipeline" / "transformer" / "released.safetensors").write_bytes(b"training state")
    return found | {"someone/sfd": root / "pipeline"}


@pytest.fixture
def hub(repositories, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with HubStandIn(repositories) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        hub.cache = tmp_path / "cache"
        yield hub


def fetched(hub):
    return {path.partition("/resolve/")[2].partition("/")[2] for _, path, _ in hub.asked if "/resolve/" in path}


def test_a_variant_fetches_what_it_needs_and_is_put_together(hub, repositories):
    pipeline = SFDPipeline.from_pretrained(REPOSITORY, variant="xl-800ep", cache_dir=hub.cache, device="cpu")
    latents = "imagenet1k-latents/sdvae_f16d32_semvaebasech16_repadinov2_vitb14_reg/imagenet_train_256"
    assert fetched(hub) == {
        "model_weights/sfd_xl/checkpoints/4000000.pt", "model_weights/sfd_autoguidance_b/checkpoints/0070000.pt",
        f"{latents}/latents_stats.pt", f"{latents}/latents_sv_stats.pt", CODEC_FILE,
    }  # fmt: skip
    assert pipeline.guidance == GuidanceConfig(mode="autoguidance", scale=1.5)
    assert (pipeline.delta_t, pipeline.config) == (0.3, NETWORK)

    folder = repositories[REPOSITORY]
    state = load_released(folder / "model_weights/sfd_xl/checkpoints/4000000.pt").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in pipeline.transformer.state_dict().items())
    assert torch.equal(pipeline.statistics.texture_std, STATISTICS.texture_std)
    assert pipeline.id2label[207] == "golden retriever" and len(pipeline.id2label) == 1000
    output = pipeline(["golden retriever", "tabby cat"], num_inference_steps=3, output_type="np")
    assert output.images.shape == (2, 8, 8, 3) and output.class_labels.tolist() == [207, 281]


def test_a_checkpoint_without_settings_takes_the_published_ones(hub, monkeypatch):
    monkeypatch.setitem(PRESETS, "XL", NETWORK)
    pipeline = SFDPipeline.from_pretrained(REPOSITORY, variant="xl-80ep", cache_dir=hub.cache, device="cpu")
    assert EMA_ONLY in fetched(hub)
    assert (pipeline.delta_t, pipeline.config.semantic_channels) == (0.3, NETWORK.semantic_channels)
    assert pipeline.guidance.scale == 1.6


def test_the_second_time_nothing_is_fetched_and_the_hub_may_be_away(hub, monkeypatch):
    first = released_pipeline("xxl-800ep", cache_dir=hub.cache)
    before = len(fetched(hub))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert released_pipeline("xxl-800ep", cache_dir=hub.cache) == first
    assert len(fetched(hub)) == before
    origin = json.loads((first / "pipeline.json").read_text())["origin"]
    assert origin["variant"] == "xxl-800ep"
    assert origin[REPOSITORY][1:3] == [
        "model_weights/sfd_1p0/checkpoints/4000000.pt", "model_weights/sfd_autoguidance_b/checkpoints/0120000.pt",
    ]  # fmt: skip
    assert origin[CODEC_REPOSITORY][1:] == [CODEC_FILE]


def test_a_folder_of_something_else_is_left_alone(hub, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(ValueError, match="thesis holds chapter1.tex and was not written by this system"):
        released_pipeline("xl-800ep", tmp_path / "thesis", cache_dir=hub.cache)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]
    build().save_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match="mine holds a pipeline that `sfd download` did not make"):
        released_pipeline("xl-800ep", tmp_path / "mine", cache_dir=hub.cache)
    assert fetched(hub) == set()


def test_a_pipeline_of_the_hub_comes_without_what_sampling_does_not_read(hub):
    loaded = SFDPipeline.from_pretrained("someone/sfd", cache_dir=hub.cache, device="cpu", micro_batch_size=4)
    assert "transformer/released.safetensors" not in fetched(hub)
    assert "pipeline.json" in fetched(hub)
    ours = build()([3, 1], output_type="np").images
    assert np.array_equal(loaded([3, 1], output_type="np").images, ours)


def test_a_name_that_is_neither_here_nor_there_is_an_error(hub):
    with pytest.raises(FileNotFoundError, match="someone/else is neither a folder here nor a model that could be"):
        SFDPipeline.from_pretrained("someone/else", cache_dir=hub.cache)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (REPOSITORY, {}, "SFD-Project/SFD holds several models: give variant=, or `sfd download`; xl-80ep, xl-800ep"),
        (REPOSITORY, {"variant": "xl"}, "unknown variant 'xl'; variants: xl-80ep, xl-800ep, xxl-80ep, xxl-800ep"),
        ("someone/sfd", {"variant": "xl-80ep"}, "variant 'xl-80ep' belongs to SFD-Project/SFD, not to someone/sfd"),
    ],
)
def test_a_variant_belongs_to_the_authors_repository(source, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        local_folder(source, **options)


def test_the_names_of_files_are_those_of_the_authors_configurations():
    """Their README moves model_weights/sfd_xl to outputs/train; a YAML reads checkpoints/4000000.pt there."""
    row = published("xl-800ep")
    assert row.main.path == "model_weights/sfd_xl/checkpoints/4000000.pt"
    assert row.guide.path == "model_weights/sfd_autoguidance_b/checkpoints/0070000.pt"
    assert published("xxl-80ep").guide.path.endswith("/0060000.pt")
    settings = checkpoint("XL", "800ep").settings
    model = {key: settings["model"][key] for key in ("model_type", "in_chans", "semantic_chans", "semfirst_delta_t")}
    assert model == {
        "model_type": "LightningDiT-XL/1", "in_chans": 48, "semantic_chans": 16, "semfirst_delta_t": 0.3,
    }  # fmt: skip
    assert settings["data"]["latent_multiplier"] == 1.0


def test_a_pipeline_is_pushed_and_fetched_again(hub, tmp_path, monkeypatch):
    hub.creates = tmp_path / "remote"
    pipeline = build(id2label=["zero", "one"])
    address = pipeline.push_to_hub("somebody/digits", private=True, token="hf_secret", commit_message="The first")
    assert address == f"{hub.address}/somebody/digits/commit/0123456789abcdef0123456789abcdef01234567"
    assert "Bearer hf_secret" in hub.tokens
    card = (hub.creates / "somebody/digits/README.md").read_text()
    assert 'SFDPipeline.from_pretrained("somebody/digits")' in card
    again = SFDPipeline.from_pretrained("somebody/digits", cache_dir=hub.cache, device="cpu")
    assert again.id2label == {0: "zero", 1: "one"}
    assert np.array_equal(drawn(again, ["one", 5]), drawn(pipeline, ["one", 5]))
    (hub.creates / "somebody/digits/README.md").write_text("my own words")
    pipeline.push_to_hub("somebody/digits")
    assert (hub.creates / "somebody/digits/README.md").read_text() == "my own words"


def test_a_push_that_the_hub_refuses_is_one_line(hub):
    with pytest.raises(OSError, match=f"somebody/digits cannot be uploaded to {hub.address}: ") as refused:
        build().push_to_hub("somebody/digits")
    assert "\n" not in str(refused.value)
