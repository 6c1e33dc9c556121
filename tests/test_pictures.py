"""pictures.py: files whole or as they were, and what the parts of a strip show."""

import numpy as np
import pytest
from PIL import Image

from sfd_fast import pictures


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    first = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    pictures.save(path, first)
    assert np.array_equal(np.asarray(Image.open(path)), first)

    def torn(self, target, *arguments, **options):
        with open(target, "wb") as file:
            file.write(b"half of a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", torn)
    with pytest.raises(OSError, match=r"cannot write .*grid.png: .*No space left on device"):
        pictures.save(path, 255 - first)
    assert np.array_equal(np.asarray(Image.open(path)), first)
    assert list(tmp_path.iterdir()) == [path]


def test_a_figure_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    rows = [{"kind": "train", "step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
    path = tmp_path / "training.png"
    pictures.loss_curves(path, {"run": rows}, {})
    content = path.read_bytes()
    assert Image.open(path).size[0] > 300

    def torn(self, target, **options):
        with open(target, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", torn)
    with pytest.raises(OSError, match="cannot write .*training.png"):
        pictures.loss_curves(path, {"run": rows}, {})
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_small_images_are_enlarged_by_whole_pixels_into_rows():
    images = [np.full((8, 8, 3), value, np.uint8) for value in (10, 20, 30)]
    picture = pictures.tile(images, 2)
    assert picture.shape == (2 * 48 + 2, 2 * 48 + 2, 3)
    assert (picture[:48, :48] == 10).all() and (picture[:48, 50:] == 20).all() and (picture[50:, :48] == 30).all()
    assert (picture[48:50] == 255).all() and (picture[50:, 50:] == 255).all()


def test_images_of_several_sizes_stand_in_cells_of_the_largest():
    images = [np.full((side, side, 3), value, np.uint8) for side, value in ((4, 10), (8, 20), (4, 30))]
    picture = pictures.tile(images, 2, size=1, gap=0)
    assert picture.shape == (16, 16, 3)
    assert (picture[:4, :4] == 10).all() and (picture[4:8, :8] == 255).all() and (picture[:8, 8:] == 20).all()
    assert (picture[8:12, :4] == 30).all() and (picture[8:, 8:] == 255).all()


@pytest.mark.parametrize(("count", "shape"), [(1, (4, 4)), (2, (8, 4)), (5, (12, 8)), (9, (12, 12)), (10, (16, 12))])
def test_a_square_grid_is_about_square(count, shape):
    images = [np.full((4, 4, 3), i, np.uint8) for i in range(count)]
    assert pictures.square_grid(images, size=1, gap=0).shape == (*shape, 3)


@pytest.mark.parametrize(
    ("tau", "name"),
    [
        (0.0, "noise"), (0.1, "I: semantics"), (0.3, "I: semantics"), (0.5, "II: both"), (1.0, "II: both"),
        (1.2, "III: texture"),
    ],
)  # fmt: skip
def test_stages_have_their_names(tau, name):
    assert pictures.stage_name(tau, 0.3) == name


def test_semantics_are_coloured_by_the_finished_ones(tmp_path):
    """One direction that varies: colours run along it, and noise far outside is clipped."""
    finished = np.zeros((1, 4, 1, 5), np.float32)
    finished[0, 2, 0] = np.linspace(-1, 1, 5)
    colours = pictures.principal_colours(finished, finished)[0, 0, :, 0].astype(int)
    assert colours[2] in (127, 128) and {colours[0], colours[-1]} == {0, 255}
    steps = np.diff(colours)
    assert (steps > 0).all() or (steps < 0).all()
    outside = pictures.principal_colours(100 * finished, finished)[0, 0, :, 0]
    assert set(outside[[0, -1]].tolist()) == {0, 255}
