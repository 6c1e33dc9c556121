"""A manifest with anything wrong in it: one line that names it, from every command that reads it."""

import copy
import json
import shutil
from functools import partial

import pytest
from harness.tiny_caches import encode_config

from sfd_fast.commands.encode import run_encode
from sfd_fast.commands.inspect import InspectConfig, run_inspect
from sfd_fast.data.cache.describe import describe
from sfd_fast.data.cache.manifest import read_manifest
from sfd_fast.data.load.latents import LatentShards

pytest_plugins = ["harness.cache_fixtures"]
WRONG = (None, True, -1, 1.5, 10**30, "x", [], {}, [1], {"a": 1}, [None], float("nan"))
READERS = {
    "describe": describe,
    "train": lambda folder: LatentShards(folder).statistics(),
    "inspect": lambda folder: run_inspect(InspectConfig(path=str(folder), picture="none", verify=True), lambda line: 0),
}


def places(tree, at=()):
    """Every place of a document, down to the numbers of its lists; of lists and shards the first two."""
    if at:
        yield at
    if isinstance(tree, dict | list):
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        for key in keys[:2] if isinstance(tree, list) or at == ("shards",) else keys:
            yield from places(tree[key], (*at, key))


def changed(manifest, at, change):
    tree = copy.deepcopy(manifest)
    place = tree
    for key in at[:-1]:
        place = place[key]
    change(place, at[-1])
    return tree


def put(value, place, key):
    place[key] = value


def mutants(manifest, wrong):
    """(what was done, the manifest with it): a value of another kind, or one left out, at every place."""
    for at in places(manifest):
        for value in wrong:
            yield f"{at} = {value}", changed(manifest, at, partial(put, value))
        yield f"{at} is missing", changed(manifest, at, lambda place, key: place.__delitem__(key))


def assert_read_or_named(read, folder, content, what):
    (folder / "manifest.json").write_text(content)
    try:
        read(folder)
    except (ValueError, FileNotFoundError) as error:
        assert type(error) in (ValueError, FileNotFoundError), what
        assert str(folder) in str(error) and "\n" not in str(error), f"{what}: {error}"


@pytest.fixture
def folder(encoded_cache, tmp_path):
    return shutil.copytree(encoded_cache, tmp_path / "cache")


@pytest.mark.parametrize("reader", READERS)
def test_a_wrong_value_anywhere_is_one_line_or_does_no_harm(folder, reader):
    manifest = json.loads((folder / "manifest.json").read_text())
    tried = list(mutants(manifest, WRONG))
    assert len(tried) > 500
    for what, tree in tried:
        assert_read_or_named(READERS[reader], folder, json.dumps(tree), what)


def test_encode_says_so_too(parts, folder):
    manifest = json.loads((folder / "manifest.json").read_text())

    def encode(folder):
        run_encode(encode_config(parts, folder, features=True))

    for what, tree in mutants(manifest, ()):
        assert_read_or_named(encode, folder, json.dumps(tree), what)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"null", b"[]", b"3", b'"x"', b"[" * 200_000, b'{"a":' * 200_000, b"NaN", b"{}" * 2,
     b'{"format": 1}', b'{"format": 1, "complete": true}', b'{"format": [1]}', b" " * (65 * 2**20)],
    ids=lambda content: repr(content[:24]),
)  # fmt: skip
def test_what_is_no_manifest_at_all_is_one_line(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json is (damaged|of format)") as raised:
        read_manifest(tmp_path)
    assert len(str(raised.value)) < 400


def test_what_contradicts_itself_is_named(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    cases = {
        "as many means as deviations": lambda m: m["statistics"]["texture"]["mean"].pop(),
        "does not list the 7 shards of 13 images": lambda m: m["shards"].pop("shard-00003.safetensors"),
        "is no file's name": lambda m: m["shards"].update({"../other.safetensors": {"bytes": 1, "sha256": ""}}),
    }
    for message, change in cases.items():
        tree = copy.deepcopy(manifest)
        change(tree)
        (folder / "manifest.json").write_text(json.dumps(tree))
        with pytest.raises(ValueError, match=f"manifest.json is damaged .*{message}"):
            LatentShards(folder)
