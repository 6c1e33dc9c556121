"""An index notices what changed in its source since: added, changed, renamed, deleted images, and other classes."""

import json
import os
import tarfile

import pytest
from harness.image_trees import crops, encoded, write_tree

from sfd_fast.data.images import screening
from sfd_fast.data.images.index import ImageIndex
from sfd_fast.data.images.opening import open_index
from sfd_fast.data.images.screening import REPORT_FILE


def silent(_):
    pass


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "tree", {"china": 3, "flower": 2})


def fresh(tree, tmp_path):
    return open_index(tree, tmp_path / "fresh", report=silent).fingerprint()


def add(tree):
    (tree / "china" / "1b.jpg").write_bytes(encoded(crops("hopper", 1)[0]))


def change(tree):
    (tree / "china" / "001.jpg").write_bytes(encoded(crops("hopper", 1)[0]))


def change_keeping_the_size(tree):
    path = tree / "china" / "001.jpg"
    data = bytearray(path.read_bytes())
    data[-40] ^= 1  # within the compressed pixels
    path.write_bytes(data)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000_000))


def rename(tree):
    (tree / "china" / "001.jpg").rename(tree / "china" / "new.jpg")


def delete(tree):
    (tree / "china" / "001.jpg").unlink()


@pytest.mark.parametrize(
    ("act", "message"),
    [(add, "1 files differ from the index (1 added, such as china/1b.jpg)"),
     (change, "1 files differ from the index (1 changed, such as china/001.jpg)"),
     (change_keeping_the_size, "1 files differ from the index (1 changed, such as china/001.jpg)"),
     (rename, "2 files differ from the index (1 added, such as china/new.jpg; 1 gone, such as china/001.jpg)"),
     (delete, "1 files differ from the index (1 gone, such as china/001.jpg)")],
)  # fmt: skip
def test_what_differs_is_said_and_update_screens_only_that(tree, tmp_path, monkeypatch, act, message):
    open_index(tree, tmp_path / "out", report=silent)
    act(tree)
    with pytest.raises(ValueError) as raised:
        open_index(tree, tmp_path / "out", report=silent)
    assert str(raised.value).startswith(message) and "--update" in str(raised.value)
    expected, examined, examine = fresh(tree, tmp_path), [], screening.examine
    monkeypatch.setattr(screening, "examine", lambda data: examined.append(1) or examine(data))
    index = open_index(tree, tmp_path / "out", report=silent, update=True)
    assert index.fingerprint() == expected and len(examined) == (0 if act is delete else 1)
    assert open_index(tree, tmp_path / "out", report=silent).fingerprint() == expected


def test_files_that_were_only_touched_are_the_same(tree, tmp_path):
    open_index(tree, tmp_path / "out", report=silent)
    for path in tree.rglob("*.jpg"):
        os.utime(path)
    open_index(tree, tmp_path / "out", report=silent)


def test_an_unreadable_image_is_no_difference_until_it_is_mended(tree, tmp_path):
    (tree / "china" / "bad.jpg").write_bytes(b"no image")
    assert len(open_index(tree, tmp_path / "out", report=silent)) == 5
    assert len(open_index(tree, tmp_path / "out", report=silent)) == 5
    (tree / "china" / "bad.jpg").write_bytes(encoded(crops("china", 1)[0]))
    with pytest.raises(ValueError, match="1 added, such as china/bad.jpg"):
        open_index(tree, tmp_path / "out", report=silent)
    assert len(open_index(tree, tmp_path / "out", report=silent, update=True)) == 6
    assert json.loads((tmp_path / "out" / REPORT_FILE).read_text()) == {}


def write_tar(path, count):
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            for suffix, data in ((".jpg", encoded(crops("china", count)[i])), (".cls", b"0")):
                info = tarfile.TarInfo(f"{i}{suffix}")
                info.size = len(data)
                import io

                archive.addfile(info, io.BytesIO(data))


def test_tar_shards_are_looked_into_only_when_they_were_written_since(tmp_path, monkeypatch):
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", 2)
    open_index(tmp_path / "tars", tmp_path / "out", report=silent)
    from sfd_fast.data.images import opening

    scan = opening.scan
    monkeypatch.setattr(opening, "scan", lambda source: pytest.fail("looked into"))
    open_index(tmp_path / "tars", tmp_path / "out", report=silent)
    monkeypatch.setattr(opening, "scan", scan)
    write_tar(tmp_path / "tars" / "a.tar", 3)
    with pytest.raises(ValueError, match="differ from the index"):
        open_index(tmp_path / "tars", tmp_path / "out", report=silent)
    assert len(open_index(tmp_path / "tars", tmp_path / "out", report=silent, update=True)) == 3


def test_counts_of_what_decoders_show_differently_are_kept(tmp_path):
    from PIL import Image

    folder = tmp_path / "tree" / "a"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(encoded(Image.new("RGBA", (8, 8), (1, 2, 3, 4)), "png"))
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "1.jpg").write_bytes(encoded(crops("china", 1)[0], exif=exif))
    (folder / "2.png").write_bytes(encoded(Image.new("I;16", (8, 8), 300), "png"))
    index = open_index(tmp_path / "tree", tmp_path / "out", report=silent)
    assert index.counts_of_traits() == {"rotated by EXIF": 1, "transparent": 1, "of 16 bits": 1}
    assert not index.plain.any()


def damaged(path, **changes):
    """The index with other tensors or metadata."""
    from sfd_fast.data.cache.shards import ShardWriter, map_tensors, read_header

    header = read_header(path)
    tensors = {name: value.clone() for name, value in map_tensors(path, header).items()}
    metadata = header.metadata | changes.pop("metadata", {})
    tensors |= changes
    tensors = {name: value for name, value in tensors.items() if value is not None}
    with ShardWriter(path, {n: (v.dtype, tuple(v.shape)) for n, v in tensors.items()}, metadata) as writer:
        for name, value in tensors.items():
            writer.write(name, 0, value)


@pytest.mark.parametrize(
    "change",
    [{"labels": None}, {"labels": [9] * 5}, {"labels": [0] * 4}, {"name_ends": [9, 3, 20, 30, 71]},
     {"metadata": {"classes": 3}}, {"metadata": {"containers": None}}, {"metadata": {"skipped": None}}],
)  # fmt: skip
def test_a_malformed_index_is_one_line_that_names_it(tree, tmp_path, change):
    import torch

    open_index(tree, tmp_path / "out", report=silent)
    path = tmp_path / "out" / "index.safetensors"
    damaged(path, **{k: torch.tensor(v, dtype=torch.int32) if isinstance(v, list) else v for k, v in change.items()})
    with pytest.raises(ValueError, match="the index of the images is damaged .*: delete .*index.safetensors") as raised:
        ImageIndex.load(path)
    assert "\n" not in str(raised.value)
