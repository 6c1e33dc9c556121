"""Screening finds every damaged file once; the index remembers and notices changes."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
from harness.image_trees import crops, encoded, write_tree
from PIL import Image

from sfd_fast.data.images import screening
from sfd_fast.data.images.index import INDEX_FILE
from sfd_fast.data.images.opening import open_index
from sfd_fast.data.images.screening import REPORT_FILE


def silent(_):
    pass


def without_progress(lines):
    return [line for line in lines if not line.startswith("screening: ")]


def test_an_index_knows_labels_sizes_and_bytes(tmp_path):
    tree = write_tree(tmp_path / "tree")
    index = open_index(tree, tmp_path / "out", report=silent)
    assert len(index) == 13 and index.classes == ["china", "flower", "hopper"]
    assert np.bincount(index.labels).tolist() == [5, 4, 4]
    assert index.key(5) == "flower/000.jpg"
    assert index.read(5) == (tree / "flower" / "000.jpg").read_bytes()
    assert [(int(index.widths[i]), int(index.heights[i])) for i in range(5)] == [c.size for c in crops("china", 5)]
    assert index.plain.all()


def test_a_second_run_decodes_nothing(tmp_path, monkeypatch):
    tree = write_tree(tmp_path / "tree")
    first = open_index(tree, tmp_path / "out", report=silent)
    monkeypatch.setattr(screening, "examine", lambda data: pytest.fail("decoded again"))
    second = open_index(tree, tmp_path / "out", report=silent)
    assert second.fingerprint() == first.fingerprint()


def test_the_fingerprint_is_of_contents_not_of_the_place(tmp_path):
    a = open_index(write_tree(tmp_path / "a"), tmp_path / "x", report=silent)
    b = open_index(write_tree(tmp_path / "b"), tmp_path / "y", report=silent)
    c = open_index(write_tree(tmp_path / "c", seed=1), tmp_path / "z", report=silent)
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()


def damage(tree):
    whole = (tree / "china" / "001.jpg").read_bytes()
    (tree / "china" / "001.jpg").write_bytes(whole[: len(whole) // 2])
    (tree / "hopper" / "zzz.png").write_text("no image")


def test_damaged_files_are_listed_and_skipped(tmp_path):
    tree = write_tree(tmp_path / "tree")
    damage(tree)
    lines = []
    index = open_index(tree, tmp_path / "out", report=lines.append)
    assert len(index) == 12
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert set(report) == {str(tree / "china" / "001.jpg"), str(tree / "hopper" / "zzz.png")}
    assert "truncated" in report[str(tree / "china" / "001.jpg")]
    assert without_progress(lines) == [f"2 of 14 images are unreadable, listed in {tmp_path / 'out' / REPORT_FILE}"]


def test_damaged_files_are_fatal_where_asked_for_also_on_a_second_run(tmp_path):
    tree = write_tree(tmp_path / "tree")
    damage(tree)
    for _ in range(2):
        with pytest.raises(ValueError, match="2 images are unreadable, the first is .*001.jpg .*truncated"):
            open_index(tree, tmp_path / "out", on_bad="fail", report=silent)


def test_a_class_of_damaged_files_alone_is_an_error(tmp_path):
    tree = write_tree(tmp_path / "tree")
    (tree / "odd").mkdir()
    (tree / "odd" / "0.jpg").write_text("")
    with pytest.raises(ValueError, match="class 'odd' of .* has no readable image"):
        open_index(tree, tmp_path / "out", report=silent)


def test_a_file_that_changed_since_is_named(tmp_path):
    tree = write_tree(tmp_path / "tree")
    index = open_index(tree, tmp_path / "out", report=silent)
    (tree / "china" / "002.jpg").write_bytes(b"other")
    with pytest.raises(OSError, match="002.jpg changed since it was screened .*--update"):
        index.read(2)
    (tree / "china" / "003.jpg").unlink()
    with pytest.raises(OSError, match="003.jpg cannot be read any more"):
        index.read(3)


def test_an_index_of_another_source_is_refused(tmp_path):
    open_index(write_tree(tmp_path / "tree"), tmp_path / "out", report=silent)
    with pytest.raises(ValueError, match=f"{INDEX_FILE} is the index of .*tree, not of .*other"):
        open_index(write_tree(tmp_path / "other"), tmp_path / "out", report=silent)


def test_unusual_files_are_not_plain(tmp_path):
    tree = write_tree(tmp_path / "tree", {"china": 1})
    image = crops("china", 1)[0]
    folder = tree / "china"
    (folder / "a.png").write_bytes(encoded(image, "png"))
    (folder / "b.jpg").write_bytes(encoded(image.convert("CMYK")))
    (folder / "c.png").write_bytes(encoded(image.convert("RGBA"), "png"))
    (folder / "d.gif").write_bytes(encoded(image, "gif"))
    (folder / "e.webp").write_bytes(encoded(image, "webp"))
    (folder / "f.png").write_bytes(png(np.arange(1200, dtype=">u2").reshape(20, 20, 3) * 50, 16))
    (folder / "g.png").write_bytes(png(np.arange(1200).astype("u1").reshape(20, 20, 3), 8))
    index = open_index(tree, tmp_path / "out", report=silent)
    assert Image.open(folder / "f.png").mode == Image.open(folder / "g.png").mode == "RGB"
    assert index.plain.tolist() == [True, True, False, False, False, False, False, True]


def png(pixels, bits):
    """An RGB PNG of 8 or 16 bits a channel, which PIL cannot write; pixels (H, W, 3), big-endian."""
    chunk = lambda kind, data: (  # noqa: E731
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_whatever_a_damaged_file_raises_is_a_finding(tmp_path, monkeypatch):
    """A TIFF whose strips begin at a text makes PIL raise TypeError."""
    tree = write_tree(tmp_path / "tree", {"china": 2})
    tiff = bytearray(encoded(crops("china", 1)[0], "tiff"))
    offset = struct.unpack("<I", tiff[4:8])[0]
    for at in range(offset + 2, offset + 2 + 12 * struct.unpack("<H", tiff[offset : offset + 2])[0], 12):
        if struct.unpack("<H", tiff[at : at + 2])[0] == 273:
            tiff[at + 2 : at + 4] = struct.pack("<H", 2)
    with pytest.raises(TypeError):
        Image.open(io.BytesIO(bytes(tiff))).convert("RGB")
    (tree / "china" / "bad.tiff").write_bytes(tiff)
    index = open_index(tree, tmp_path / "out", report=silent)
    assert len(index) == 2
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert report[str(tree / "china" / "bad.tiff")].startswith("TypeError")


def test_a_dangling_link_is_listed(tmp_path):
    tree = write_tree(tmp_path / "tree", {"china": 2})
    (tree / "china" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    index = open_index(tree, tmp_path / "out", report=silent)
    assert len(index) == 2
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert "No such file" in report[str(tree / "china" / "gone.jpg")]


def test_a_screening_that_was_killed_continues(tmp_path, monkeypatch):
    """Stopped in its third block of two images: the first two are not decoded again, by other ranks either."""
    tree = write_tree(tmp_path / "tree")
    damage(tree)
    unbroken = open_index(tree, tmp_path / "unbroken", report=silent).fingerprint()
    monkeypatch.setattr(screening, "SCREEN_BLOCK", 2)
    examine, looked = screening.examine, []

    def stop_at_fifth(data):
        looked.append(data)
        if len(looked) > 4:
            raise KeyboardInterrupt
        return examine(data)

    monkeypatch.setattr(screening, "examine", stop_at_fifth)
    with pytest.raises(KeyboardInterrupt):
        open_index(tree, tmp_path / "out", num_threads=1, report=silent)
    (journal,) = (tmp_path / "out").glob(".writing-screened-*")
    with journal.open("a") as file:
        file.write('\n[5, {"width": 3')  # killed within a line
    again = []
    monkeypatch.setattr(screening, "examine", lambda data: again.append(data) or examine(data))
    index = open_index(tree, tmp_path / "out", num_threads=1, report=silent)
    assert len(again) == 14 - 4 and not set(again) & set(looked[:4])
    assert index.fingerprint() == unbroken
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [INDEX_FILE, REPORT_FILE]
    assert (tmp_path / "out" / REPORT_FILE).read_bytes() == (tmp_path / "unbroken" / REPORT_FILE).read_bytes()


def test_what_was_screened_of_other_images_is_not_used(tmp_path, monkeypatch):
    tree = write_tree(tmp_path / "tree", {"china": 2})
    monkeypatch.setattr(screening, "write_index", lambda *_: pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception):
        open_index(tree, tmp_path / "out", report=silent)
    monkeypatch.undo()
    (tree / "china" / "001.jpg").write_bytes(encoded(crops("flower", 1)[0]))
    assert open_index(tree, tmp_path / "out", report=silent).read(1) == (tree / "china" / "001.jpg").read_bytes()


def test_classes_without_images_are_said_or_fatal_as_configured(tmp_path):
    """Labels of tar shards and datasets may have gaps; of folders, they are an error in any case."""
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as archive:
        for label, image in zip((0, 3), crops("china", 2)):
            for name, data in ((f"{label}.jpg", encoded(image)), (f"{label}.cls", str(label).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    lines = []
    assert len(open_index(tmp_path / "tars", tmp_path / "out", report=lines.append).classes) == 4
    assert without_progress(lines) == [f"2 of 4 classes of {tmp_path / 'tars'} have no images: 1, 2"]
    for out in ("out", "new"):
        with pytest.raises(ValueError, match="2 of 4 classes of .*tars have no images: 1, 2.*on_bad=skip"):
            open_index(tmp_path / "tars", tmp_path / out, on_bad="fail", report=silent)


def test_ignored_tar_files_are_said(tmp_path):
    tree = write_tree(tmp_path / "tree", {"china": 2})
    (tree / "backup.tar").write_bytes(b"anything")
    lines = []
    assert len(open_index(tree, tmp_path / "out", report=lines.append)) == 2
    assert without_progress(lines) == [f"{tree} has class folders: its 1 *.tar files, such as backup.tar, are ignored"]


def test_a_damaged_index_is_named_and_may_be_deleted(tmp_path):
    tree = write_tree(tmp_path / "tree", {"china": 2})
    fingerprint = open_index(tree, tmp_path / "out", report=silent).fingerprint()
    path = tmp_path / "out" / INDEX_FILE
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"the index of the images is damaged .*delete {path}"):
        open_index(tree, tmp_path / "out", report=silent)
    path.unlink()
    assert open_index(tree, tmp_path / "out", report=silent).fingerprint() == fingerprint
