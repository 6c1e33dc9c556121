"""Files that a user names for output: what another program wrote there is left alone unless --overwrite says so."""

import json

import numpy as np
import pytest
import yaml
from harness.tiny_run import MODEL, write_data
from PIL import Image

from sfd_fast import cli
from sfd_fast.config import SFDConfig
from sfd_fast.formats.model_folder import save_model
from sfd_fast.formats.released_config import to_released
from sfd_fast.models.dit import LightningDiT


def released_yaml(folder):
    (folder / "released.yaml").write_text(yaml.safe_dump(to_released(SFDConfig())))
    return ["convert", "--source", folder / "released.yaml", "--target"]


def model_folder(folder):
    save_model(folder / "model", LightningDiT(MODEL), config=SFDConfig(model=MODEL))
    return ["convert", "--source", folder / "model", "--target"]


def evaluation(folder):
    for name, seed in (("a", 0), ("b", 1)):
        images = np.random.default_rng(seed).integers(0, 255, (12, 8, 8, 3), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", arr_0=images)
    return ["evaluate", "--samples", folder / "a.npz", "--reference", folder / "b.npz", "--features", "digits",
            "--metrics", "fid", "--progress", "false", "--device", "cpu"]  # fmt: skip


def report(folder):
    return [*evaluation(folder), "--output"]


def statistics(folder):
    return [*evaluation(folder), "--output", folder / "report.json", "--save_statistics"]


def inspection(folder):
    return ["inspect", write_data(folder / "cache"), "--picture"]


COMMANDS = {
    "configuration.yaml": released_yaml, "weights.pt": model_folder, "report-of-mine.json": report,
    "statistics.npz": statistics, "picture.png": inspection,
}  # fmt: skip
FOREIGN = {
    "text": lambda path: path.write_text("lr: 1\n"),
    "json": lambda path: path.write_text(json.dumps({"metrics": 1})),
    "picture": lambda path: Image.new("RGB", (4, 4)).save(path, format="PNG"),
    "arrays": lambda path: np.savez(path.open("wb"), mu=np.zeros(2), sigma=np.eye(2)),
    "nothing": lambda path: path.touch(),
    "link": lambda path: (path.with_name("elsewhere").write_text("of someone"), path.symlink_to("elsewhere")),
}


def run(command, target, *more):
    cli.main([*map(str, command), str(target), *more])


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_of_another_program_is_left_alone(tmp_path, capsys, name, kind):
    command, target = COMMANDS[name](tmp_path), tmp_path / name
    FOREIGN[kind](target)
    before = target.read_bytes()
    with pytest.raises(SystemExit):
        run(command, target)
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and f"{target} is there already and this command did not write it" in said
    assert target.read_bytes() == before
    run(command, target, "--overwrite", "true")
    assert target.read_bytes() != before


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_in_the_place_of_the_file_is_named(tmp_path, capsys, name):
    command = COMMANDS[name](tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(SystemExit):
        run(command, tmp_path / name, "--overwrite", "true")
    assert str(tmp_path / name) in capsys.readouterr().err
    assert not list((tmp_path / name).iterdir())


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "weights.pt"])
def test_a_file_of_the_same_command_is_written_again(tmp_path, name):
    command, target = COMMANDS[name](tmp_path), tmp_path / name
    run(command, target)
    first = target.read_bytes()
    run(command, target)
    assert target.read_bytes() == first


def test_weights_in_the_released_format_carry_no_mark_and_need_the_word(tmp_path, capsys):
    command = model_folder(tmp_path)
    run(command, tmp_path / "a.pt")
    with pytest.raises(SystemExit):
        run(command, tmp_path / "a.pt")
    assert "--overwrite true" in capsys.readouterr().err
    run(command, tmp_path / "a.pt", "--overwrite", "true")
