"""What a click on the page draws: the choice checked, the trajectories, the twin, and the same choice as code."""

import re
import runpy
from dataclasses import replace

import numpy as np
import pytest
from harness.tiny_pipelines import STATISTICS, TINY, build, drawn, random_model
from PIL import Image

from sfd_fast.app.choice import Choice, as_command, as_python
from sfd_fast.app.studio import Studio
from sfd_fast.app.view import moment_html, stage_bar
from sfd_fast.cli import parse
from sfd_fast.commands.sample import run_sample
from sfd_fast.config import GuidanceConfig
from sfd_fast.models.texture import IdentityCodec
from sfd_fast.sampling.pipeline import SFDPipeline
from sfd_fast.sampling.pipeline_folder import PipelineSettings, save_parts

PLAIN = GuidanceConfig()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline with named classes, and a synchronous twin without a guide."""
    root = tmp_path_factory.mktemp("app")
    ours = build()
    save_parts(
        root / "model", ours.transformer, ours.guide, ours.texture_codec, ours.statistics, None,
        PipelineSettings(ours.delta_t, 4, ours.sampler, ours.guidance, 1.0),
        {0: "cat", 3: "dog & co"},
    )  # fmt: skip
    SFDPipeline(
        random_model(replace(TINY, two_clocks=False), 2), statistics=STATISTICS, texture_codec=IdentityCodec(4, 2),
        delta_t=0.0, device="cpu",
    ).save_pretrained(root / "twin")  # fmt: skip
    return root


@pytest.fixture(scope="module")
def studio(folders):
    return Studio(str(folders / "model"), twin=str(folders / "twin"), batch=4, device="cpu")


def chosen(studio, **changes):
    values = {
        "labels": [3, 0], "num_images": 3, "seed": 5, "solver": "heun", "num_inference_steps": 4,
        "mode": "autoguidance", "apart": False, "scales": (1.5, 1.0, 1.0),
    }  # fmt: skip
    return studio.chosen(**values | changes)


def test_classes_have_the_names_of_the_pipeline_and_numbers_where_it_has_none(studio):
    assert studio.names[:4] == ["cat (0)", "class 1", "class 2", "dog & co (3)"]
    assert len(studio.names) == 10


def test_images_take_the_chosen_classes_in_turn(studio):
    assert chosen(studio, num_images=4).labels == (3, 0, 3, 0)


def test_one_scale_serves_both_parts_and_two_serve_each(studio):
    assert chosen(studio).guidance.scales == (1.5, 1.5)
    assert chosen(studio, apart=True, scales=(9.0, 1.2, 2.5)).guidance.scales == (1.2, 2.5)
    assert not chosen(studio, mode="none").guidance.active


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": []}, "no class is chosen"),
        ({"num_images": 5}, "the number of images is 5: this page draws 1 to 4"),
        ({"num_inference_steps": 0}, "the number of steps is 0: give 1 to 1000"),
        ({"num_inference_steps": 10**9}, "the number of steps is 1000000000: give 1 to 1000"),
        ({"num_inference_steps": 4.5}, "the number of steps is 4.5: give a whole number"),
        ({"seed": None}, "the seed is empty: give a whole number"),
        ({"scales": (None, 1.0, 1.0)}, "the texture scale is empty: give a number"),
        ({"scales": (float("nan"), 1.0, 1.0)}, "the texture scale is nan: give a number"),
    ],
)
def test_a_bad_field_is_named(studio, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        chosen(studio, **changes)


def test_what_only_the_pipeline_knows_is_refused_in_its_words(studio):
    with pytest.raises(ValueError, match="seed -1 must be"):
        studio.draw(chosen(studio, seed=-1))


def test_the_last_moment_is_what_the_pipeline_draws(folders, studio):
    choice = chosen(studio)
    pipeline = SFDPipeline.from_pretrained(folders / "model", micro_batch_size=4, device="cpu")
    images = drawn(pipeline, [3, 0, 3], seed=5, solver="heun", num_inference_steps=4, guidance_scale=1.5)
    assert np.array_equal(studio.draw(choice)[0].moments[-1].texture, images)


def test_stage_one_moves_semantics_alone_and_stage_three_texture_alone(studio):
    track = studio.draw(chosen(studio, num_inference_steps=26))[0]
    start, first = track.at(0), track.at(0.3 / 1.3)
    late, end = track.at(1 / 1.3), track.at(1)
    assert [start.tau, first.tau, late.tau, end.tau] == pytest.approx([0, 0.3, 1, 1.3])
    assert np.array_equal(start.texture, first.texture)
    assert not np.array_equal(start.semantic, first.semantic)
    assert np.array_equal(late.semantic, end.semantic)
    assert not np.array_equal(late.texture, end.texture)


def test_the_twin_starts_from_the_same_noise_and_ends_at_its_own_time(studio):
    ours, twin = studio.draw(chosen(studio))
    assert np.array_equal(ours.at(0).texture, twin.at(0).texture)
    assert twin.moments[-1].tau == pytest.approx(1.0)
    assert twin.title == "synchronous, guidance none 1"  # it has no guide


def test_a_twin_of_other_classes_is_refused(folders, tmp_path):
    SFDPipeline(
        random_model(replace(TINY, num_classes=3), 2), statistics=STATISTICS, texture_codec=IdentityCodec(4, 2),
        delta_t=0.3, device="cpu",
    ).save_pretrained(tmp_path / "other")  # fmt: skip
    with pytest.raises(ValueError, match="num_classes = 3, the model 10"):
        Studio(str(folders / "model"), twin=str(tmp_path / "other"), batch=4, device="cpu")


def test_the_view_marks_three_stages_and_stands_semantics_above_texture(studio):
    tracks = studio.draw(chosen(studio))
    view = moment_html(tracks, ["0: cat", "1: dog & co", "2: cat"], 0.5)
    assert view.index('class="semantics small"') < view.index('class="texture small"')
    assert [view.count(f'alt="{part}"') for part in ("semantics", "texture")] == [6, 6]
    assert "1: dog &amp; co" in view
    assert re.findall(r"flex: ([\d.]+) 0 0", stage_bar(0.65, 0.3)) == ["0.3", "0.7", "0.3"]
    assert "left: 50.00%" in stage_bar(0.65, 0.3)
    assert stage_bar(0.5, 0.0).count("<span") == 1  # one clock, one stage
    assert "http" not in view


def files_of(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"), key=lambda path: int(path.stem))]


@pytest.mark.parametrize("changes", [{}, {"mode": "cfg", "apart": True, "scales": (1.0, 1.25, 2.0)}, {"mode": "none"}])
def test_the_copied_python_and_command_draw_the_same_pixels(studio, tmp_path, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    choice = chosen(studio, **changes)
    shown = studio.draw(choice)[0].moments[-1].texture

    script = tmp_path / "copied.py"
    script.write_text(as_python(choice, studio.origin))
    runpy.run_path(str(script))
    assert np.array_equal(np.stack(files_of(tmp_path)), shown)

    words = as_command(choice, studio.origin, str(tmp_path / "samples")).replace("\\\n", "").split()
    assert words[:2] == ["sfd", "sample"]
    run_sample(parse("sample", [*words[2:], "--progress", "false"]))
    assert np.array_equal(np.stack(files_of(tmp_path / "samples" / "images")), shown)


def test_paths_with_spaces_survive_the_shell(studio):
    origin = replace(studio.origin, model="/a folder/it's")
    choice = Choice((1,), 0, "heun", 4, PLAIN)
    assert "--model '/a folder/it'\"'\"'s'" in as_command(choice, origin)
