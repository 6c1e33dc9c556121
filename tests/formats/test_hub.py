"""Files of the hub: only those named, continued, checked, once. The hub is a stand-in on loopback; none is asked."""

import json
import multiprocessing
import os
import shutil
import time

import pytest
from harness.hub_stand_in import COMMIT, HubStandIn

from sfd_fast.formats.hub import Repository, download_zip, require_space

NAME = "someone/thing"
CONTENT = bytes(range(256)) * 20_000


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "remote"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "big.safetensors").write_bytes(CONTENT)
    (folder / "small.json").write_text("{}\n")
    (folder / "other.safetensors").write_bytes(b"not asked for")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with HubStandIn({NAME: folder}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        hub.cache = tmp_path / "cache"
        yield hub


def repository(hub, **options):
    return Repository(NAME, cache_dir=hub.cache, **options)


def fetched(hub):
    return [(path.rpartition("/")[2], wanted) for method, path, wanted in hub.asked if "/resolve/" in path]


def test_named_files_are_fetched_and_no_others(hub):
    here = repository(hub)
    folder = here.fetch(here.find(["small.json", "sub/big.safetensors", "absent.bin"]))
    assert folder == hub.cache / "someone--thing" / COMMIT
    assert (folder / "sub" / "big.safetensors").read_bytes() == CONTENT
    assert (folder / "small.json").read_text() == "{}\n"
    assert not (folder / "other.safetensors").exists()
    assert {name for name, _ in fetched(hub)} == {"small.json", "big.safetensors"}


def test_what_is_here_is_not_fetched_again(hub):
    for _ in range(2):
        here = repository(hub)
        here.fetch(here.find(["small.json"]))
    assert len(fetched(hub)) == 1


def interrupted(address, cache):
    """A process that dies while the file arrives."""
    os.environ["HF_ENDPOINT"] = address
    here = Repository(NAME, cache_dir=cache)
    here.fetch(here.find(["sub/big.safetensors"]))


def test_a_killed_download_goes_on_where_it_broke_off(hub):
    content = CONTENT * 5
    (hub.repositories[NAME] / "sub" / "big.safetensors").write_bytes(content)
    process = multiprocessing.get_context("spawn").Process(target=interrupted, args=(hub.address, hub.cache))

    def kill():
        """Two of the client's chunks of 10 MB are on the disk, the third never comes whole."""
        until = time.monotonic() + 60
        while sum(part.stat().st_size for part in hub.cache.rglob("*.part")) < 20_000_000 and time.monotonic() < until:
            time.sleep(0.05)
        process.kill()

    hub.cut["sub/big.safetensors"] = 25_000_000
    hub.broke = kill
    process.start()
    process.join(240)
    assert process.exitcode == -9
    (part,) = hub.cache.rglob("*.part")
    size = part.stat().st_size
    assert 20_000_000 <= size <= 25_000_000 < len(content)
    here = repository(hub)
    folder = here.fetch(here.find(["sub/big.safetensors"]))
    assert (folder / "sub" / "big.safetensors").read_bytes() == content
    assert fetched(hub) == [("big.safetensors", None), ("big.safetensors", f"bytes={size}-")]
    assert not part.exists()


@pytest.mark.parametrize("name", ["sub/big.safetensors", "small.json"])
def test_other_content_of_the_same_size_is_refused_and_thrown_away(hub, name):
    true = (hub.repositories[NAME] / name).read_bytes()
    hub.lies[name] = b"!" + true[1:]
    here = repository(hub)
    with pytest.raises(ValueError, match=rf"{NAME}/{name} arrived damaged: its .*SHA-.* is .*, the hub says"):
        here.fetch(here.find([name]))
    del hub.lies[name]
    assert (here.fetch(here.find([name])) / name).read_bytes() == true


def test_a_file_that_is_not_there_is_named_with_its_neighbours(hub):
    with pytest.raises(FileNotFoundError, match=r"has no sub/4.pt at revision main; sub holds sub/big.safetensors"):
        repository(hub).require(["sub/4.pt"])


def test_a_revision_and_a_token_reach_the_hub(hub):
    repository(hub, revision="v2", token="hf_secret")
    assert ("GET", f"api/models/{NAME}/revision/v2", None) in hub.asked
    assert hub.tokens == {"Bearer hf_secret"}


def test_a_repository_that_does_not_exist_is_named(hub):
    with pytest.raises(OSError, match=f"nobody/nothing cannot be fetched from {hub.address}: "):
        Repository("nobody/nothing", cache_dir=hub.cache)


def test_without_the_hub_what_was_fetched_before_serves(hub, monkeypatch, caplog):
    caplog.set_level("INFO", logger="sfd_fast")
    repository(hub)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert repository(hub).commit == COMMIT
    assert "using what was fetched of someone/thing before" in caplog.text
    with pytest.raises(OSError, match=r"someone/thing cannot be fetched from http://127\.0\.0\.1:9"):
        repository(hub, revision="another")


def test_a_name_that_leads_outside_is_refused(hub):
    shutil.copy(hub.repositories[NAME] / "small.json", hub.repositories[NAME].parent / "evil.json")
    here = repository(hub)
    with pytest.raises(ValueError, match=r"names \.\./evil.json, outside itself"):
        here.fetch(here.find(["../evil.json"]))


def test_too_little_space_is_said_beforehand(tmp_path):
    with pytest.raises(OSError, match=r"1000000000\.00 GB are needed in .*GB are free"):
        require_space(tmp_path / "not" / "there", 10**18)


def test_an_archive_without_a_published_hash_is_checked_by_its_own(tmp_path, hub):
    import numpy as np

    file = hub.repositories[NAME] / "reference.npz"
    np.savez(file, arr_0=np.arange(1000))
    url = f"{hub.address}/{NAME}/resolve/{COMMIT}/reference.npz"
    whole = file.read_bytes()
    hub.lies["reference.npz"] = whole[:500] + b"?" + whole[501:]
    with pytest.raises(ValueError, match=r"reference.npz arrived damaged \(arr_0.npy\)"):
        download_zip(url, tmp_path / "got.npz")
    hub.lies.clear()
    download_zip(url, tmp_path / "got.npz")
    assert (tmp_path / "got.npz").read_bytes() == whole


def test_the_stand_in_describes_files_as_the_hub_does(hub):
    """One file of each kind, as huggingface.co describes an empty one: both hashes are known constants."""
    folder = hub.repositories[NAME]
    (folder / "empty.json").touch()
    (folder / "empty.pt").touch()
    plain, large = repository(hub).find(["empty.json", "empty.pt"])
    assert (plain.blob, plain.sha256) == ("e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", "")
    assert large.sha256 == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert json.dumps([plain.size, large.size]) == "[0, 0]"
