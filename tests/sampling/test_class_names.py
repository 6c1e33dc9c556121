"""Names of classes: which class each means, and how they come from a cache into a pipeline."""

import json

import numpy as np
import pytest
import torch
from harness.tiny_pipelines import build, drawn
from harness.tiny_run import tiny_config, write_data

from sfd_fast.data.cache.describe import describe
from sfd_fast.data.cache.manifest import MANIFEST
from sfd_fast.files.digest import file_digest
from sfd_fast.formats.imagenet import imagenet_names, rows
from sfd_fast.sampling.class_names import ClassNames, checked_id2label, shown_names
from sfd_fast.sampling.pipeline import SFDPipeline
from sfd_fast.training.diffusion import run_train
from sfd_fast.training.export import export_checkpoint

NAMES = {0: "tench, Tinca tinca", 1: "golden_retriever", 2: "crane", 3: "crane", 4: "tub, vat", 5: "bathtub, tub",
         7: "5"}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline():
    return build(id2label=NAMES)


@pytest.mark.parametrize(
    "given, numbers",
    [
        ("golden retriever", [1]),
        ("Golden_Retriever", [1]),
        (["tench", "tinca  tinca", "tench, Tinca tinca"], [0, 0, 0]),
        ("tub", [4]),  # the first name of one class precedes a later name of another
        ("7", [7]),
        ("9", [9]),
        (["golden retriever", 3, "2"], [1, 3, 2]),
        (np.array([3, 1]), [3, 1]),
        (4, [4]),
    ],
)
def test_a_class_is_named_or_numbered(pipeline, given, numbers):
    output = pipeline(given, num_inference_steps=3)
    assert output.class_labels.tolist() == numbers
    assert np.array_equal(np.stack(output.images), drawn(pipeline, numbers, num_inference_steps=3))


@pytest.mark.parametrize(
    "given, message",
    [
        ("golden retreiver", "no class is called 'golden retreiver'; did you mean 'golden retriever'?"),
        ("spaceship", "no class is called 'spaceship'; the pipeline's id2label has all names"),
        ("crane", r"'crane' may be several classes: give the number as a number, 2 \(crane\) or 3 \(crane\)"),
        ("5", r"'5' may be several classes: .* 5 \(bathtub, tub\) or 7 \(5\)"),
        ("10", "label 10 is out of range: this model has the classes 0 to 9"),
        (["tench", None], "class_labels must be one-dimensional integers of 64 bits, not None"),
    ],
)
def test_a_name_that_means_no_class_or_several_is_an_error(pipeline, given, message):
    with pytest.raises(ValueError, match=message):
        pipeline(given)


def test_labels_and_their_ids_as_diffusers_has_them(pipeline):
    assert pipeline.labels["golden retriever"] == 1 and pipeline.labels["tinca tinca"] == 0
    assert "crane" not in pipeline.labels
    assert pipeline.get_label_ids(["tench", "vat"]) == [0, 4]
    assert build().labels == {}


@pytest.mark.parametrize(
    "given, found",
    [
        (None, None),
        (["a", "b"], {0: "a", 1: "b"}),
        ({"3": "d", 1: "b"}, {1: "b", 3: "d"}),
    ],
)
def test_names_are_a_list_or_a_dictionary(given, found):
    assert checked_id2label(given, 5) == found


@pytest.mark.parametrize("given", [{"5": "f"}, {"x": "a"}, {0: 7}, {0: " "}, {-1: "a"}, "abc", 3])
def test_what_names_no_class_is_an_error(given):
    with pytest.raises(ValueError, match="id2label"):
        checked_id2label(given, 5)


def test_people_are_shown_the_first_name_or_the_number():
    assert shown_names({0: "tench, Tinca tinca"}, 2) == ["tench", "class 1"]
    assert shown_names(None, 2) == ["class 0", "class 1"]


def test_imagenets_names_stand_in_the_order_of_its_labels():
    names = imagenet_names()
    assert (len(names), len({number for number, _ in rows()})) == (1000, 1000)
    assert [number for number, _ in rows()] == sorted(number for number, _ in rows())  # WordNet's order is the labels'
    meant = ClassNames(names)
    for name, number in (("tench", 0), ("golden retriever", 207), ("tabby cat", 281), ("toilet tissue", 999)):
        assert meant.number(name) == number
    assert imagenet_names(10) is None


def test_names_go_with_the_saved_pipeline_and_may_be_rewritten_by_hand(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "pipeline.json"
    content = json.loads(path.read_text())
    assert content["id2label"]["1"] == "golden_retriever"
    assert SFDPipeline.from_pretrained(tmp_path / "saved", device="cpu").id2label == NAMES
    path.write_text(json.dumps(content | {"id2label": {"1": "chien d'or"}}))
    again = SFDPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.get_label_ids("chien d'or") == [1]
    path.write_text(json.dumps(content | {"id2label": {"10": "none"}}))
    with pytest.raises(ValueError, match="id2label names class '10'"):
        SFDPipeline.from_pretrained(tmp_path / "saved", device="cpu")


@pytest.mark.parametrize(
    "classes, names",
    [
        (["cat", "dog", "n02099601", "hen", "fox"], {0: "cat", 1: "dog", 2: "golden retriever", 3: "hen", 4: "fox"}),
        (["0", "1", "2", "3", "4"], None),
        (["10", "20", "30", "40", "50"], {0: "10", 1: "20", 2: "30", 3: "40", 4: "50"}),
    ],
)
def test_names_travel_from_the_caches_manifest_into_the_pipeline(classes, names, tmp_path):
    data = write_data(tmp_path / "data")
    shards = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(data.glob("*.safetensors"))
    }
    manifest = {
        "format": 1, "complete": True, "settings": {}, "sources": {"texture_codec": "pixels:2"}, "classes": classes,
        "class_counts": [8] * 5, "shards": shards,
    }  # fmt: skip
    (data / MANIFEST).write_text(json.dumps(manifest))
    assert describe(data).class_names == (None if names is None else tuple(names.values()))
    run_train(tiny_config(data, tmp_path / "run"), progress=False, device="cpu")
    export_checkpoint(tmp_path / "run", tmp_path / "exported")
    codec = build(guide=None).texture_codec
    for folder in (tmp_path / "run", tmp_path / "exported"):
        card = json.loads((folder / "model" if folder.name == "run" else folder).joinpath("config.json").read_text())
        assert card["card"]["texture_codec"] == "pixels:2"
        with pytest.raises(ValueError, match="the texture codec has 12 latent channels, the model 2 texture channels"):
            SFDPipeline.from_pretrained(folder, device="cpu")
        codec.latent_channels = 2
        pipeline = SFDPipeline.from_pretrained(folder, texture_codec=codec, device="cpu")
        assert pipeline.id2label == names
        if names:
            assert pipeline.get_label_ids(list(names.values())) == list(names)
    assert torch.equal(pipeline.statistics.texture_mean, torch.zeros(2))
