"""Shard files: format, atomicity, determinism, and errors that name the file."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sfd_fast.data.cache.remote import open_shards
from sfd_fast.data.cache.shards import ShardWriter, map_tensors, read_header, write_shard
from sfd_fast.data.load.latents import LatentShards
from sfd_fast.files.digest import file_digest


def example(n=5):
    g = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(n, 3, 4, 4, generator=g),
        "latents_sv": torch.randn(n, 2, 4, 4, generator=g).to(torch.bfloat16),
        "feats_dino": torch.randn(n, 6, 4, 4, generator=g).half(),
        "labels": torch.arange(n),
    }


def test_safetensors_reads_what_we_write(tmp_path):
    tensors = example()
    write_shard(tmp_path / "a.safetensors", tensors, {"b": 1, "a": [2]})
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"sfd": json.dumps({"a": [2], "b": 1})}


def test_we_read_what_safetensors_writes_without_copying_it(tmp_path):
    tensors = example()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"other": "x"})
    header = read_header(tmp_path / "a.safetensors")
    read = map_tensors(tmp_path / "a.safetensors", header)
    assert header.metadata == {}
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    address = {name: read[name].data_ptr() for name in read}
    assert address["labels"] - address["latents"] == header.entries["labels"].begin - header.entries["latents"].begin


def test_rows_in_any_order_give_the_same_bytes_as_the_whole(tmp_path):
    tensors = example()
    write_shard(tmp_path / "a.safetensors", tensors, {"x": 1})
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in reversed(tensors.items())}
    with ShardWriter(tmp_path / "b.safetensors", layout, {"x": 1}) as writer:
        for row in (3, 0, 4, 1, 2):
            for name, value in tensors.items():
                writer.write(name, row, value[row : row + 1])
    assert file_digest(tmp_path / "a.safetensors") == file_digest(tmp_path / "b.safetensors")


def test_another_process_writes_the_same_bytes(tmp_path):
    code = (
        "import torch, sys; from sfd_fast.data.cache.shards import write_shard\n"
        "write_shard(sys.argv[1], {'labels': torch.arange(4), 'latents': torch.ones(4, 1, 2, 2)}, "
        "{k: k for k in {'p', 'q', 'r', 's'}})"
    )
    for name, hash_seed in (("a", "1"), ("b", "2")):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True, env=environment)
    assert file_digest(tmp_path / "a") == file_digest(tmp_path / "b")


def test_a_shard_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(path, {"labels": (torch.int64, (4,))}) as writer:
        writer.write("labels", 0, torch.arange(2))
        assert not path.exists()
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="incomplete.*labels"), ShardWriter(path, {"labels": (torch.int64, (4,))}) as w:
        w.write("labels", 0, torch.arange(2))
    assert list(tmp_path.iterdir()) == []


def test_rows_of_another_shape_are_refused(tmp_path):
    layout = {"latents": (torch.float32, (4, 2, 2, 2))}
    with pytest.raises(ValueError, match="do not fit tensor 'latents'"), ShardWriter(tmp_path / "a", layout) as writer:
        writer.write("latents", 0, torch.ones(1, 3, 2, 2))


def test_unequal_counts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="equally many samples"):
        write_shard(tmp_path / "a", {"labels": torch.arange(3), "latents": torch.ones(2, 1, 1, 1)})


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_nothing(tmp_path):
    code = (
        "import resource, sys, signal, torch\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from sfd_fast.data.cache.shards import write_shard\n"
        "write_shard(sys.argv[1], {'labels': torch.arange(4096)})"
    )
    target = tmp_path / "a.safetensors"
    result = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True)
    assert result.returncode == 1
    assert f"cannot write {target}" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_shard_is_an_error_that_names_it(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    write_shard(path, example())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{path}.*truncated"):
        read_header(path)


def test_a_file_that_is_no_shard_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((20).to_bytes(8, "little") + b"not json" * 10)
    with pytest.raises(ValueError, match=f"{path} is no safetensors file"):
        read_header(path)


def test_a_folder_without_shards_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no .*safetensors shards"):
        open_shards(tmp_path)


def header_of(table, data=b""):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        header_of({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"0000"),
        header_of({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}}, b"0000"),
        header_of({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"0000"),
        header_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"0000"),
        header_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"0000"),
        header_of({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, b"0000"),
        header_of({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, b"00000000"),
        header_of({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
        header_of({"a": {"shape": [1]}}), header_of({"a": 5}), header_of([1, 2]), header_of(b"7 "),
        header_of({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, b"0000"),
        header_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"00000000"),
        header_of(b"[" * 200_000), header_of({"__metadata__": {"sfd": "[" * 100_000}}),
        header_of({"__metadata__": {"sfd": "[1]"}}), header_of({"__metadata__": 3}), header_of(b"\xff\xfe"),
        (2**63).to_bytes(8, "little") + b"{}", b"", b"1234",
    ],
)  # fmt: skip
def test_malformed_headers_are_one_line_that_names_the_file(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path} is ") as raised:
        read_header(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [({"latents": torch.zeros(2, 1, 1, 1), "labels": torch.tensor(3)}, "must have 1 dimension"),
     ({"latents": torch.zeros(2, 1, 1, 1), "labels": torch.zeros(2)}, "'labels' is torch.float32 .*whole numbers"),
     ({"latents": torch.zeros(2, 4), "labels": torch.arange(2)}, "'latents' is .*must have 4 dimension"),
     ({"latents": torch.zeros(0, 1, 1, 1), "labels": torch.arange(0)}, "is a cache of no samples")],
)  # fmt: skip
def test_shards_of_the_wrong_kind_are_one_line(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        LatentShards(tmp_path)


def test_an_empty_shard_among_others_takes_no_memory_and_no_place(tmp_path):
    """Its tensors have no address: seen from address 0, the memory would span 128 TiB."""
    for name, count in (("a", 2), ("b", 0), ("c", 3)):
        save_file({"latents": torch.full((count, 1, 1, 1), ord(name)).float(), "labels": torch.full((count,), 1)},
                  tmp_path / f"{name}.safetensors")  # fmt: skip
    shards = LatentShards(tmp_path)
    out = shards.gather(torch.arange(5), torch.zeros(5, dtype=torch.bool))
    assert out["texture"].flatten().tolist() == [97, 97, 99, 99, 99] and shards._memory.size < 2**40
    assert shards.max_label == 1


@pytest.mark.parametrize("label", [-1, 10**12])
def test_labels_of_a_shard_that_are_no_class_numbers_are_refused(tmp_path, label):
    save_file({"latents": torch.zeros(2, 1, 1, 1), "labels": torch.tensor([0, label])}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"a.safetensors has label {label}: labels are whole numbers from 0 to 99999"):
        LatentShards(tmp_path).max_label  # noqa: B018


@pytest.mark.parametrize(("hard", "message"), [(4096, "40 samples"), (100, "40 shards need 296 open files")])
def test_more_shards_than_open_files_raise_the_soft_limit_or_name_the_hard_one(tmp_path, hard, message):
    for i in range(40):
        save_file({"latents": torch.zeros(1, 1, 1, 1), "labels": torch.tensor([0])}, tmp_path / f"{i}.safetensors")
    code = (
        "import resource, sys; from sfd_fast.data.load.latents import LatentShards\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (30, {hard}))\n"
        "try: print(len(LatentShards(sys.argv[1])), 'samples')\n"
        "except OSError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.startswith(message), done.stderr
