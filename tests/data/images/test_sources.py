"""Folders, tar shards and Hugging Face datasets list the same images; mistakes are clear."""

import io
import json
import os
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
    write_tar(tmp_path / "a.tar", [("0.jpg", image), ("1.jpg", image), ("1.cls", b"1")])
    with pytest.raises(ValueError, match="a.tar: sample '0' has no label"):
        scan(tmp_path)
    write_tar(tmp_path / "a.tar", [("0.jpg", image), ("0.cls", b"cat")])
    with pytest.raises(ValueError, match="a.tar: label of sample '0' in '0.cls' is 'cat': a label is a whole number"):
        scan(tmp_path)
    deep = ("0.json", b"[" * 100_000)
    values = (b'{"label": null}', b'{"label": 1.5}', b'{"label": "cat"}', b'{"label": -1}', b'{"label": 1e9}', b"[1]")
    names = (("0.cls", b"\xff\xfe"), ("0.cls", b"-1"), ("0.cls", b"9" * 30), deep)
    for label in (*names, *(("0.json", value) for value in values)):
        write_tar(tmp_path / "a.tar", [("0.jpg", image), label])
        with pytest.raises(ValueError, match=f"a.tar: label of sample '0' in '{label[0]}' is "):
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


def test_missing_and_empty_folders_are_clear(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        scan(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no sub-folders"):
        scan(tmp_path)


def test_images_without_labels_are_of_one_class(tmp_path):
    image = encoded(crops("china", 1)[0])
    (tmp_path / "flat").mkdir()
    (tmp_path / "tars").mkdir()
    for name in ("b.jpg", "a.jpg"):
        (tmp_path / "flat" / name).write_bytes(image)
    write_tar(tmp_path / "tars" / "a.tar", [("0.jpg", image), ("1.jpg", image)])
    for name in ("flat", "tars"):
        found = scan(tmp_path / name)
        assert (found.labels, found.classes) == ([0, 0], ["all"])
        assert "of one class" in found.notes[0]
    assert scan(tmp_path / "flat").keys == ["a.jpg", "b.jpg"]


def test_images_beside_class_folders_are_left_out_and_said(tmp_path):
    write_tree(tmp_path, {"china": 1})
    (tmp_path / "loose.jpg").write_bytes(b"x")
    found = scan(tmp_path)
    assert found.keys == ["china/000.jpg"]
    assert found.notes == [f"{tmp_path}: 1 images, such as loose.jpg, lie in no class folder: left out"]


def test_hidden_names_are_passed_over_at_every_depth(tmp_path):
    write_tree(tmp_path, {"china": 1})
    image = encoded(crops("china", 1)[0])
    for name in ("._china/0.jpg", ".ipynb_checkpoints/0.jpg", "china/._000.jpg", "china/a/.ipynb_checkpoints/0.jpg",
                 "china/__MACOSX/1.jpg", ".hidden/x.jpg"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    found = scan(tmp_path)
    assert (found.classes, found.keys) == (["china"], ["china/000.jpg"])
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", [("./0.jpg", image), ("./0.cls", b"1"), ("._0.jpg", b"x"),
                                            (".ipynb_checkpoints/0.jpg", b"x"), ("__MACOSX/0.jpg", b"x")])  # fmt: skip
    (tmp_path / "tars" / "._a.tar").write_bytes(b"resource fork")
    assert contents(tmp_path / "tars") == [(1, image)]


def test_links_are_followed_but_never_in_circles_and_pipes_do_not_block(tmp_path):
    write_tree(tmp_path / "tree", {"china": 1})
    write_tree(tmp_path / "elsewhere", {"flower": 2})
    china = tmp_path / "tree" / "china"
    (china / "more").symlink_to(tmp_path / "elsewhere" / "flower")
    (china / "circle").symlink_to(tmp_path / "tree")
    (china / "link.jpg").symlink_to(tmp_path / "elsewhere" / "flower" / "000.jpg")
    os.mkfifo(china / "pipe.jpg")
    found = scan(tmp_path / "tree")
    assert found.keys == ["china/000.jpg", "china/link.jpg", "china/more/000.jpg", "china/more/001.jpg"]
    assert found.notes == [f"{tmp_path / 'tree'}: 1 names are pipes, sockets or devices, the first is "
                           f"{china / 'pipe.jpg'}: left out"]  # fmt: skip
    with pytest.raises(OSError, match="no regular file"):
        Reader("folder", str(tmp_path / "tree"), []).read("china/pipe.jpg", 0, 0, 0)


def test_class_folders_that_are_numbers_are_in_the_order_of_the_numbers(tmp_path):
    for folder, names in (("a", ("10", "9", "0")), ("b", ("10", "9", "x"))):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            (tmp_path / folder / name / "0.jpg").write_bytes(b"x")
    assert scan(tmp_path / "a").classes == ["0", "9", "10"]
    assert scan(tmp_path / "b").classes == ["10", "9", "x"]


def test_names_that_are_not_utf_8_are_listed_as_unreadable(tmp_path):
    write_tree(tmp_path, {"china": 1})
    with open(os.fsencode(tmp_path / "china") + b"/caf\xe9.jpg", "wb") as file:
        file.write(b"x")
    found = scan(tmp_path)
    assert found.keys == ["china/000.jpg"]
    assert found.unreadable == {"china/caf\\xe9.jpg": "its name is not UTF-8: rename it"}


def test_json_without_a_label_is_none(tmp_path):
    """Captions and addresses, as download tools write them."""
    members = [("0.jpg", b"x"), ("0.json", b'{"caption": "a dog"}'), ("1.jpg", b"x"), ("1.json", b"{}")]
    write_tar(tmp_path / "a.tar", members)
    found = scan(tmp_path)
    assert found.labels == [0, 0] and found.classes == ["all"] and "has no labels" in found.notes[0]
    write_tar(tmp_path / "a.tar", [*members, ("2.jpg", b"x"), ("2.cls", b"1")])
    with pytest.raises(ValueError, match=r"a.tar: sample '0' has no label"):
        scan(tmp_path)


def test_a_cls_file_wins_over_json_that_holds_other_things(tmp_path):
    image = encoded(crops("china", 1)[0])
    write_tar(tmp_path / "a.tar", [("0.json", b'{"width": 5}'), ("0.jpg", image), ("0.cls", b"3")])
    assert contents(tmp_path) == [(3, image)]


def test_concatenated_tars_are_read_to_the_end(tmp_path):
    a, b = (encoded(image) for image in crops("china", 2))
    write_tar(tmp_path / "a", [("0.jpg", a), ("0.cls", b"0")])
    write_tar(tmp_path / "b", [("1.jpg", b), ("1.cls", b"1")])
    (tmp_path / "ab.tar").write_bytes((tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes())
    assert contents(tmp_path) == [(0, a), (1, b)]
    (tmp_path / "ab.tar").write_bytes((tmp_path / "a").read_bytes() + b"rubbish" * 200)
    with pytest.raises(ValueError, match="ab.tar is no plain tar file or is truncated"):
        scan(tmp_path)


def write_rows(path, columns, features):
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)


def test_parquet_files_of_several_splits_give_train(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    data = [encoded(image) for image in crops("flower", 3)]
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    for name, i in (("train-00000-of-00002", 0), ("train-00001-of-00002", 1), ("test-00000-of-00001", 2)):
        columns = {"image": [{"bytes": data[i], "path": None}], "label": [i]}
        write_rows(tmp_path / "set" / "data" / f"{name}.parquet", columns, features)
    assert contents(tmp_path / "set") == [(0, data[0]), (1, data[1])]
    assert any("the split 'train' is taken, left out: test (1 files)" in note for note in scan(tmp_path / "set").notes)
    for path in (tmp_path / "set" / "data").glob("train*"):
        path.rename(path.with_name(path.name.replace("train", "validation")))
    with pytest.raises(ValueError, match="has the splits test, validation and no 'train'"):
        scan(tmp_path / "set")


def test_columns_are_chosen_by_name_before_type_and_said(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    a, b = (encoded(image) for image in crops("flower", 2))
    features = {
        "mask": datasets.Image(), "image": datasets.Image(), "colour": datasets.ClassLabel(names=["red", "blue"]),
        "label": datasets.Value("int64"),
    }  # fmt: skip
    columns = {"mask": [{"bytes": a, "path": None}], "image": [{"bytes": b, "path": None}], "colour": [1], "label": [4]}
    write_rows(tmp_path / "set" / "0.parquet", columns, features)
    assert contents(tmp_path / "set") == [(4, b)]
    assert f"{tmp_path / 'set'}: images are column 'image', labels column 'label'" in scan(tmp_path / "set").notes


@pytest.mark.parametrize("value", [None, "cat", 1.5, -1, 10**12])
def test_labels_of_a_dataset_that_are_no_class_numbers_are_refused(tmp_path, value):
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    image = {"bytes": encoded(crops("flower", 1)[0]), "path": None}
    kind = {str: "string", float: "float32"}.get(type(value), "int64")
    features = {"image": datasets.Image(), "label": datasets.Value(kind)}
    write_rows(tmp_path / "set" / "0.parquet", {"image": [image], "label": [value]}, features)
    with pytest.raises(ValueError, match="'label' of row 0 is '.*': a label is a whole number from 0 to 99999"):
        scan(tmp_path / "set")


def test_a_dataset_without_labels_is_of_one_class(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    data = encoded(crops("flower", 1)[0])
    features = {"picture": datasets.Image(), "text": datasets.Value("string")}
    write_rows(tmp_path / "set" / "0.parquet", {"picture": [{"bytes": data, "path": None}], "text": ["a"]}, features)
    assert contents(tmp_path / "set") == [(0, data)] and scan(tmp_path / "set").classes == ["all"]


def test_a_dataset_of_no_rows_is_an_error(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    write_rows(tmp_path / "set" / "0.parquet", {"image": [], "label": []}, features)
    with pytest.raises(ValueError, match="set cannot be read as a dataset: .*no data"):
        scan(tmp_path / "set")
