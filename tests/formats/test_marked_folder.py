"""Folders with our mark: replaced in one step, strangers left alone, flipped bits found."""

import json
import os
import sys

import pytest
import torch
from harness.tiny_encoders import save_autoencoder
from harness.tiny_pipelines import STATISTICS, TINY, random_model

from sfd_fast.files.atomic import sweep
from sfd_fast.formats.marked_folder import MARK
from sfd_fast.formats.model_folder import read_directory, write_directory
from sfd_fast.formats.texture import load_codec, save_codec
from sfd_fast.models.texture import IdentityCodec
from sfd_fast.sampling.pipeline import SFDPipeline

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod", "os.listdir", "os.scandir"}


def save(folder, step, num_values=5):
    write_directory(folder, "dit", {"a": torch.full((num_values,), float(step))}, {"card": {"step": step}})


def pipeline(guide=None):
    codec = IdentityCodec(4, 2)
    return SFDPipeline(
        random_model(TINY, 0), guide=guide, statistics=STATISTICS, texture_codec=codec, delta_t=0.3, device="cpu"
    )


def killed_at(number, action):
    """Runs an action in a child process that ends at its number-th file event. Whether the action came to its end."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event, arguments):
            nonlocal seen
            seen += event in EVENTS
            if seen == number:
                os._exit(9)

        try:
            sys.addaudithook(count)
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0


@pytest.mark.parametrize("linked", [False, True], ids=["a folder", "a link to a folder"])
def test_killed_at_any_moment_there_is_the_old_model_or_the_new_one(tmp_path, linked):
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "model"
    if linked:
        folder.symlink_to("elsewhere/model")
    save(folder, 0)
    found = set()
    for number in range(1, 200):
        last = max(found, default=0)
        ended = killed_at(number, lambda step=last + 1: save(folder, step))
        stored = read_directory(folder)
        step = stored.content["card"]["step"]
        assert step in (last, last + 1) and (stored.tensors["a"] == step).all()
        found.add(step)
        if ended:
            break
        sweep(folder.resolve().parent)
    assert ended and number > 20, "the sweep saw few events"
    assert folder.is_symlink() == linked
    assert sorted(os.listdir(folder.resolve().parent)) == (["model"] if linked else ["elsewhere", "model"])


def test_a_new_codec_takes_the_place_of_an_old_one_whatever_its_kind(tmp_path):
    diffusers = load_codec(save_autoencoder(tmp_path / "vae"))
    for codec in (diffusers, IdentityCodec(4, 2), diffusers):
        save_codec(tmp_path / "codec", codec)
        assert type(load_codec(tmp_path / "codec")) is type(codec)


@pytest.mark.parametrize("what", ["notes.txt", "model.safetensors", "config.json"])
def test_a_folder_of_unknown_origin_is_never_replaced(tmp_path, what):
    (tmp_path / what).write_text("mine")
    for attempt in (
        lambda: save(tmp_path, 1),
        lambda: save_codec(tmp_path, IdentityCodec(4, 2)),
        lambda: pipeline().save_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=f"holds {what} and was not written by this system, so it is not replaced"):
            attempt()
    assert (tmp_path / what).read_text() == "mine" and os.listdir(tmp_path) == [what]


def test_an_autoencoder_that_diffusers_saved_itself_is_never_replaced(tmp_path):
    save_autoencoder(tmp_path / "vae")
    with pytest.raises(ValueError, match="vae holds config.json, .* and was not written by this system"):
        save_codec(tmp_path / "vae", IdentityCodec(4, 2))


def test_a_file_is_no_place_for_a_model(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(ValueError, match="model is a file; choose a folder"):
        save(tmp_path / "model", 1)


def test_what_others_put_into_a_folder_of_ours_stays(tmp_path):
    save(tmp_path / "model", 1)
    (tmp_path / "model" / "README.md").write_text("mine")
    (tmp_path / "model" / "figures").mkdir()
    (tmp_path / "model" / "figures" / "a.png").write_bytes(b"png")
    for _ in range(2):
        save(tmp_path / "model", 2)
        assert (tmp_path / "model" / "README.md").read_text() == "mine"
        assert (tmp_path / "model" / "figures" / "a.png").read_bytes() == b"png"
    assert read_directory(tmp_path / "model").content["card"] == {"step": 2}


def test_an_earlier_pipelines_guide_goes_with_it(tmp_path):
    pipeline(guide=random_model(TINY, 1)).save_pretrained(tmp_path)
    assert (tmp_path / "guide").is_dir()
    pipeline().save_pretrained(tmp_path)
    assert not (tmp_path / "guide").exists()
    assert SFDPipeline.from_pretrained(tmp_path, device="cpu").guide is None


def all_files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_flipped_bit_in_any_file_of_a_pipeline_is_found_and_named(tmp_path):
    pipeline(guide=random_model(TINY, 1)).save_pretrained(tmp_path)
    names = all_files(tmp_path)
    assert len(names) == 13, names  # three models of three files, two of statistics, the index and the mark
    for name in names:
        content = (tmp_path / name).read_bytes()
        for place in (0, len(content) // 2, len(content) - 2):
            flipped = bytearray(content)
            flipped[place] ^= 1
            (tmp_path / name).write_bytes(flipped)
            with pytest.raises(ValueError, match=f"{tmp_path / name}") as error:
                SFDPipeline.from_pretrained(tmp_path, device="cpu")
            assert "\n" not in str(error.value)
        (tmp_path / name).write_bytes(content)
    SFDPipeline.from_pretrained(tmp_path, device="cpu")


def test_a_file_of_another_model_is_found(tmp_path):
    for step in (1, 2):
        save(tmp_path / str(step), step)
    (tmp_path / "1" / "model.safetensors").write_bytes((tmp_path / "2" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="1/model.safetensors is damaged: its SHA-256 is another"):
        read_directory(tmp_path / "1")


def test_a_missing_file_is_found(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json is missing"):
        read_directory(tmp_path)


def test_weights_without_their_mark_load_with_one_line_about_it(tmp_path, caplog):
    save(tmp_path, 1)
    (tmp_path / MARK).unlink()
    assert read_directory(tmp_path).content["card"] == {"step": 1}
    assert f"{tmp_path} has no {MARK}: its files are used without a check of their digests" in caplog.text
    save(tmp_path, 2)  # still ours: the weights say so
    assert read_directory(tmp_path).content["card"] == {"step": 2}


@pytest.mark.parametrize(
    "mark",
    ["", "{", "[]", "{}", "[" * 100_000, '{"format": 1}', '{"entries": 3, "files": {}, "digest": ""}',
     '{"entries": [], "files": {"model.safetensors": 1}, "digest": "0"}', "\x00" * 100],
)  # fmt: skip
def test_a_malformed_mark_is_one_line(tmp_path, mark):
    save(tmp_path, 1)
    (tmp_path / MARK).write_text(mark)
    for attempt in (lambda: read_directory(tmp_path), lambda: save(tmp_path, 2)):
        with pytest.raises(ValueError, match=MARK) as error:
            attempt()
        assert "\n" not in str(error.value)


def test_files_get_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        save(tmp_path / "model", 1)
    finally:
        os.umask(before)
    assert {name: (tmp_path / "model" / name).stat().st_mode & 0o777 for name in os.listdir(tmp_path / "model")} == {
        "config.json": 0o640, "model.safetensors": 0o640, MARK: 0o640
    }  # fmt: skip
    assert json.loads((tmp_path / "model" / MARK).read_text())["kind"] == "dit"
