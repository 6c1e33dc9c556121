"""Folders, tar shards and Hugging Face datasets list the same images; mistakes are clear."""

import io
import json
import tarfile

import pytest
from harness.image_trees import crops, encoded, write_tree

from sfd_fast.data.images.sources import Reader, scan


def contents(path):
    """[(label, bytes)] of a source in its order."""
    found = scan(path)
    reader = Reader(found.kind, found.root, found.containers)
    rows = zip(found.keys, found.container, found.offsets, found.sizes)
    return [(label, reader.read(*row)) for label, row in zip(found.labels, rows)]


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_labels_follow_sorted_class_names_and_deeper_folders_belong_to_their_class(tmp_path):
    write_tree(tmp_path, {"flower": 2, "china": 3})
    (tmp_path / "china" / "deep").mkdir()
    (tmp_path / "china" / "deep" / "X.JPEG").write_bytes(encoded(crops("china", 1)[0]))
    (tmp_path / "china" / "notes.txt").write_text("no image")
    found = scan(tmp_path)
    assert found.classes == ["china", "flower"]
    assert found.keys == ["china/000.jpg", "china/001.jpg", "china/002.jpg", "china/deep/X.JPEG",
                          "flower/000.jpg", "flower/001.jpg"]  # fmt: skip
    assert found.labels == [0, 0, 0, 0, 1, 1]
    assert contents(tmp_path)[3][1] == (tmp_path / "china" / "deep" / "X.JPEG").read_bytes()


def test_tar_shards_hold_label_files_or_json(tmp_path):
    a, b, c = (encoded(image) for image in crops("china", 3))
    write_tar(tmp_path / "b.tar", [("n/2.png", encoded(crops("china", 1)[0], "png")), ("n/2.cls", b"0")])
    write_tar(
        tmp_path / "a.tar",
        [("0.jpg", a), ("0.cls", b"7"), ("1.json", json.dumps({"label": 3}).encode()), ("1.jpg", b),
         ("dir/0.jpg", c), ("dir/0.cls", b"1\n")],
    )  # fmt: skip
    assert contents(tmp_path)[:3] == [(7, a), (3, b), (1, c)]
    assert [label for label, _ in contents(tmp_path)] == [7, 3, 1, 0]
    assert contents(tmp_path / "a.tar") == [(7, a), (3, b), (1, c)]
    assert len(scan(tmp_path).classes) == 8


def test_tar_mistakes_name_tar_and_sample(tmp_path):
    image = encoded(crops("china", 1)[0])
    write_tar(tmp_path / "a.tar", [("0.jpg", image)])
    with pytest.raises(ValueError, match="a.tar: sample '0' has no label"):
        scan(tmp_path)
    write_tar(tmp_path / "a.tar", [("0.jpg", image), ("0.cls", b"cat")])
    with pytest.raises(ValueError, match="a.tar: label of sample '0' in '0.cls' is unreadable"):
        scan(tmp_path)
    for label in (("0.cls", b"\xff\xfe"), ("0.cls", b"-1"), ("0.json", b"[1]"), ("0.json", b'{"label": null}')):
        write_tar(tmp_path / "a.tar", [("0.jpg", image), label])
        with pytest.raises(ValueError, match=f"a.tar: label of sample '0' in '{label[0]}' is unreadable"):
            scan(tmp_path)
    write_tar(tmp_path / "a.tar", [("0.jpg", image), ("0.png", image), ("0.cls", b"1")])
    with pytest.raises(ValueError, match="sample '0' has two images"):
        scan(tmp_path)
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match="a.tar is no plain tar file or is truncated"):
        scan(tmp_path)


@pytest.mark.parametrize("saved", ["disk", "parquet"])
def test_hugging_face_datasets_give_their_encoded_bytes(tmp_path, saved):
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    data = [encoded(image) for image in crops("flower", 3)]
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = datasets.Dataset.from_dict(
        {"picture": [{"bytes": d, "path": None} for d in data], "label": [1, 0, 1]}, features=features
    )
    if saved == "disk":
        rows.save_to_disk(tmp_path / "set")
    else:
        (tmp_path / "set").mkdir()
        rows.to_parquet(tmp_path / "set" / "train-0.parquet")
    assert contents(tmp_path / "set") == list(zip([1, 0, 1], data))
    assert scan(tmp_path / "set").classes == ["x", "y"]


def test_a_stray_tar_beside_class_folders_is_ignored_and_said(tmp_path):
    write_tree(tmp_path, {"china": 2})
    write_tar(tmp_path / "stray.tar", [("0.jpg", b"x"), ("0.cls", b"0")])
    found = scan(tmp_path)
    assert found.kind == "folder" and found.keys == ["china/000.jpg", "china/001.jpg"]
    assert found.notes == [f"{tmp_path} has class folders: its 1 *.tar files, such as stray.tar, are ignored"]


def test_tar_shards_may_lie_beside_folders_without_images(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.jpg", encoded(crops("china", 1)[0])), ("0.cls", b"0")])
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "notes.txt").write_text("no image")
    assert scan(tmp_path).kind == "tar"


def test_an_empty_class_is_an_error_that_names_its_folder(tmp_path):
    write_tree(tmp_path, {"china": 1})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"class folder {tmp_path / 'empty'} holds no images"):
        scan(tmp_path)


def test_missing_and_flat_folders_are_clear(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        scan(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no sub-folders"):
        scan(tmp_path)
