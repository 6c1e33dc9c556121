"""Folders of pipelines: what stands for one, and what is said of those that are damaged, edited or something else."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from harness.tiny_pipelines import STATISTICS, TINY, build, random_model

from sfd_fast.config import GuidanceConfig, SamplerConfig, SFDConfig
from sfd_fast.formats.model_folder import save_model
from sfd_fast.models.texture import IdentityCodec
from sfd_fast.sampling.pipeline import SFDPipeline


@pytest.fixture
def saved(tmp_path):
    build().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def change(folder, **values):
    path = folder / "pipeline.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | values).items() if v != "left out"}))
    return path


def load(folder, **options):
    return SFDPipeline.from_pretrained(folder, device="cpu", **options)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"delta_t": "0.3"}, "delta_t '0.3' must be a finite number"),
        ({"delta_t": None}, "delta_t None must be a finite number"),
        ({"delta_t": -1.0}, "delta_t -1.0 must not be negative"),
        ({"delta_t": "left out"}, "delta_t is missing"),
        ({"micro_batch_size": 0}, "micro_batch_size 0 must be at least 1"),
        ({"micro_batch_size": 2.5}, "micro_batch_size 2.5 must be a whole number"),
        ({"sampler": []}, r"sampler \[\] must be a group of settings"),
        ({"sampler": {"num_inference_steps": 1e9}}, "num_inference_steps 1000000000.0 must be a whole number"),
        ({"sampler": {"solvr": "heun"}}, "unknown key 'sampler.solvr'; did you mean 'sampler.solver'"),
        ({"guidance": {"mode": "cgf"}}, "mode 'cgf' is unknown; choose none, cfg or autoguidance"),
        ({"guidance": "left out"}, "guidance is missing"),
        ({"latent_multiplier": 0}, "latent_multiplier 0 must be greater than 0"),
        ({"classes": ["cat"]}, "classes"),
        ({"sampler": {"solver": "euler"}}, "was edited: its settings are not those .* remove its 'digest'"),
    ],
)
def test_wrong_settings_are_one_line_with_the_files_name(saved, values, message):
    path = change(saved, **values)
    with pytest.raises(ValueError, match=message) as refused:
        load(saved)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "[" * 100_000, '"text"', "{}", "\x00\xff"])
def test_a_pipeline_json_that_is_none_is_one_line_with_its_name(saved, content):
    path = saved / "pipeline.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError) as refused:
        load(saved)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_names_of_classes_may_be_added_and_settings_edited_on_purpose(saved):
    change(saved, id2label={"0": "cat"})
    assert load(saved).sampler == SamplerConfig(solver="heun", num_inference_steps=4)
    change(saved, sampler={"solver": "euler", "num_inference_steps": 9}, digest="left out")
    assert load(saved).sampler == SamplerConfig(solver="euler", num_inference_steps=9)


@pytest.mark.parametrize("part", ["transformer", "guide"])
def test_a_flipped_bit_in_a_part_is_found(saved, part):
    path = saved / part / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{part}/model.safetensors is damaged: its SHA-256 is another"):
        load(saved)


def test_a_run_directory_stands_for_its_model_and_its_guide(tmp_path):
    for name, seed, depth in (("run", 0, 2), ("weak", 1, 1)):
        model = random_model(replace(TINY, depth=depth), seed)
        config = SFDConfig(model=model.config)
        save_model(tmp_path / name / "model", model, config=config, statistics=STATISTICS)
        (tmp_path / name / "checkpoints" / "00000010").mkdir(parents=True)
    options = {"guide": tmp_path / "weak", "texture_codec": IdentityCodec(4, 2)}
    by_run, by_model = load(tmp_path / "run", **options), load(tmp_path / "run" / "model", **options)
    settings = {"num_inference_steps": 4, "guidance_scale": 1.5, "output_type": "np"}
    images = [pipe([1], **settings).images for pipe in (by_run, by_model)]
    assert np.array_equal(*images)


def test_what_is_no_model_is_named_with_the_command_that_makes_one(tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    (tmp_path / "0400000.pt").touch()
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "run", checkpoint.parent, checkpoint):
        message = f"{path} is a training checkpoint, not the folder .*: sfd convert --source {path} --target FOLDER"
        with pytest.raises(ValueError, match=message):
            load(path)
    with pytest.raises(ValueError, match="0400000.pt is a file, .*sfd convert --source .*0400000.pt --target FOLDER"):
        load(tmp_path / "0400000.pt")
    with pytest.raises(ValueError, match="empty is no model, .*: a pipeline has pipeline.json, a network model.safe"):
        load(tmp_path / "empty")


def test_classes_that_training_saw_go_with_the_pipeline(tmp_path):
    model, codec = random_model(TINY, 0), IdentityCodec(4, 2)
    card = {"step": 3, "classes": [7, 2, 5]}
    save_model(tmp_path / "run", model, config=SFDConfig(model=TINY), statistics=STATISTICS, card=card)
    pipe = load(tmp_path / "run", texture_codec=codec)
    assert pipe.classes == (2, 5, 7)
    pipe.save_pretrained(tmp_path / "whole")
    assert load(tmp_path / "whole").classes == (2, 5, 7)
    assert build().classes is None
    for classes, shown in (([], r"\[\]"), ([3, 10], r"\[3, 10\]")):
        with pytest.raises(ValueError, match=f"trained classes {shown} must be some of 0 to 9"):
            build(classes=classes)


def test_cfg_on_a_model_without_a_trained_null_class_is_refused():
    model = random_model(replace(TINY, class_dropout=0.0), 0)
    pipe = SFDPipeline(model, statistics=STATISTICS, texture_codec=IdentityCodec(4, 2), delta_t=0.3, device="cpu")
    for settings in ({"guidance_scale": 1.5}, {"guidance": GuidanceConfig(mode="cfg", scale=2.0)}):
        with pytest.raises(ValueError, match=r"'cfg' needs a null class, .* trained without one \(class_dropout 0\)"):
            pipe([1], num_inference_steps=4, **settings)
    assert len(pipe([1], num_inference_steps=4, guidance_scale=1.0).images) == 1


def test_a_pipeline_behind_a_symbolic_link_is_found(saved, tmp_path):
    os.symlink(saved, tmp_path / "link")
    assert load(tmp_path / "link").micro_batch_size == 4
