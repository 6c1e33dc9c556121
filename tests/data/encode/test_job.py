"""Caches in the making: killed, resumed, shared by ranks, repaired; always the same folder in the end."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from harness.tiny_caches import SIZE, contents, encode_config, features_config

from sfd_fast.commands.encode import run_encode
from sfd_fast.commands.features import run_features
from sfd_fast.data.encode.job import CacheJob
from sfd_fast.data.load.latents import LatentShards

pytest_plugins = ["harness.cache_fixtures"]


def in_child(run, config, environment):
    os.environ.update(environment)
    run(config)


def launch(run, config, **environment):
    """run(config) in a process of its own, forked: it has all imports already and computes on one thread."""
    settings = {name: str(value) for name, value in environment.items()}
    process = multiprocessing.get_context("fork").Process(target=in_child, args=(run, config, settings))
    process.start()
    return process


@pytest.mark.parametrize("kind", ["encode", "features"])
def test_a_killed_run_continues_to_the_same_folder(parts, encoded_cache, tmp_path, kind):
    """Killed after its first shard, with temporary files of every kind left behind."""
    out = tmp_path / "out"
    if kind == "encode":
        run, config, unbroken = run_encode, encode_config(parts, out, features=True), encoded_cache
    else:
        run, config, unbroken = run_features, features_config(parts, out), tmp_path / "unbroken"
        run_features(replace(config, out=str(unbroken)))
    process = launch(run, config)
    deadline = time.monotonic() + 120
    while not (out / "shard-00000.json").exists() and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not json.loads((out / "manifest.json").read_text())["complete"], "killed too late to tell"
    for name in ("shard-00001.safetensors", "shard-00001.json", "manifest.json", "latents_stats.pt", "index/index.x"):
        path = out / name
        path.with_name(f".writing-{process.pid}-1-{path.name}").write_bytes(b"half")
    if kind == "encode":
        with pytest.raises(ValueError, match="is an unfinished cache"):
            LatentShards(out)
    first = (out / "shard-00000.safetensors").stat().st_mtime_ns
    run(config)
    assert (out / "shard-00000.safetensors").stat().st_mtime_ns == first, "a finished shard was repeated"
    assert contents(out) == contents(unbroken)


def test_a_run_that_continues_gives_the_space_of_unfinished_shards_back_first(parts, tmp_path, monkeypatch):
    def stop(job, shards, ranks, report):
        assert not list(job.out.glob(".writing-*"))
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".writing-1-1-shard-00000.safetensors").write_bytes(b"half")
    monkeypatch.setattr(CacheJob, "encode_shards", stop)
    with pytest.raises(KeyboardInterrupt):
        run_encode(encode_config(parts, tmp_path / "out"))


def test_two_ranks_write_the_same_bytes_as_one(parts, encoded_cache, tmp_path):
    config = encode_config(parts, tmp_path / "out", features=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}
    processes = [launch(run_encode, config, RANK=rank, **address) for rank in range(2)]
    for process in processes:
        process.join(timeout=180)
    assert [process.exitcode for process in processes] == [0, 0]
    assert contents(tmp_path / "out") == contents(encoded_cache)


def test_two_processes_of_torchrun_write_the_same_bytes_as_one(parts, encoded_cache, tmp_path):
    """The real launcher and the real command line; 13 images do not divide by 2, nor 7 shards."""
    options = {"out": tmp_path / "out", "image_size": SIZE, "shard_size": 2, "batch_size": 4, "storage": "fp32",
               "num_threads": 1, "device": "cpu", "features": "true", "flip": "true"} | parts  # fmt: skip
    flags = [f"--{name}={value}" for name, value in options.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    result = subprocess.run(
        [*launcher, "sfd_fast", "encode", *flags],
        capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "13 images in 7 shards" in result.stdout and "on 2 rank(s)" in result.stdout
    assert contents(tmp_path / "out") == contents(encoded_cache)


def copied(cache, tmp_path):
    return Path(shutil.copytree(cache, tmp_path / "copy"))


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def test_a_finished_cache_is_left_alone(parts, encoded_cache, tmp_path):
    out = copied(encoded_cache, tmp_path)
    before = times(out)
    run_encode(encode_config(parts, out, features=True, verify=True))
    assert times(out) == before


def test_a_finished_cache_loses_what_a_run_that_was_killed_at_the_end_left(parts, encoded_cache, tmp_path):
    """Killed between the final manifest and the removal of the records."""
    out = copied(encoded_cache, tmp_path)
    row = json.loads((out / "manifest.json").read_text())["shards"]["shard-00001.safetensors"]
    (out / "shard-00001.json").write_text(json.dumps(row))
    for name in (".writing-1-1-manifest.json", "index/.writing-1-1-index.safetensors"):
        (out / name).write_bytes(b"half")
    before = (out / "shard-00001.safetensors").stat().st_mtime_ns
    run_encode(encode_config(parts, out, features=True))
    assert contents(out) == contents(encoded_cache)
    assert (out / "shard-00001.safetensors").stat().st_mtime_ns == before


def test_only_missing_and_damaged_shards_of_a_finished_cache_are_encoded_again(parts, encoded_cache, tmp_path, capsys):
    out = copied(encoded_cache, tmp_path)
    (out / "shard-00002.safetensors").unlink()
    os.truncate(out / "shard-00005.safetensors", 5000)
    (out / "latents_stats.pt").unlink()
    before = times(out)
    run_encode(encode_config(parts, out, features=True))
    assert contents(out) == contents(encoded_cache)
    changed = {name for name, when in times(out).items() if before.get(name) != when}
    assert changed >= {"shard-00002.safetensors", "shard-00005.safetensors", "latents_stats.pt"}
    assert not {"shard-00000.safetensors", "shard-00006.safetensors", "manifest.json"} & changed
    text = capsys.readouterr().out
    assert "2 of 7 shards are missing or damaged and are encoded, the first is shard-00002.safetensors" in text


def test_verify_finds_and_mends_a_flipped_bit(parts, encoded_cache, tmp_path):
    out = copied(encoded_cache, tmp_path)
    path = out / "shard-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    config = encode_config(parts, out, features=True)
    run_encode(config)
    assert path.read_bytes() == bytes(data), "without verify only sizes are compared"
    run_encode(replace(config, verify=True))
    assert contents(out) == contents(encoded_cache)


def test_a_repair_that_gives_other_bytes_is_refused_and_leaves_no_shard(parts, encoded_cache, tmp_path):
    out = copied(encoded_cache, tmp_path)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["shards"]["shard-00003.safetensors"]["sha256"] = "0" * 64
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "shard-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="shard-00003.safetensors was encoded again to other bytes"):
        run_encode(encode_config(parts, out, features=True))
    assert not list(out.glob("shard-00003*"))


def test_a_finished_shard_that_was_truncated_is_repeated_when_a_run_continues(parts, encoded_cache, tmp_path):
    out = tmp_path / "out"
    process = launch(run_encode, encode_config(parts, out, features=True))
    while not (out / "shard-00000.json").exists():
        assert process.is_alive()
        time.sleep(0.0005)
    process.kill()
    process.join()
    os.truncate(out / "shard-00000.safetensors", 5000)
    run_encode(encode_config(parts, out, features=True))
    assert contents(out) == contents(encoded_cache)


def test_a_manifest_of_another_format_is_refused(parts, encoded_cache, tmp_path):
    out = copied(encoded_cache, tmp_path)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"format": 9}))
    for work in (lambda: run_encode(encode_config(parts, out, features=True)), lambda: LatentShards(out)):
        with pytest.raises(ValueError, match="manifest.json is of format 9, this version reads 1"):
            work()


def change_images(tree):
    """One more at the end of the first class, one changed in the last class: only the first shards stay."""
    (tree / "china" / "zzz.jpg").write_bytes((tree / "flower" / "000.jpg").read_bytes())
    (tree / "hopper" / "003.jpg").write_bytes((tree / "flower" / "001.jpg").read_bytes())


def delete_images(tree):
    for path in sorted((tree / "hopper").iterdir())[1:]:
        path.unlink()


@pytest.mark.parametrize(("change", "num_kept"), [(change_images, 2), (delete_images, 5)])
def test_an_update_gives_the_cache_that_a_new_folder_gets(parts, tmp_path, change, num_kept):
    tree = Path(shutil.copytree(parts["images"], tmp_path / "tree"))
    options = {"images": str(tree), "texture_codec": "pixels"}
    config = encode_config(options, tmp_path / "out")
    run_encode(config)
    before = times(tmp_path / "out")
    change(tree)
    with pytest.raises(ValueError, match="files differ from the index .*--update"):
        run_encode(config)
    run_encode(replace(config, update=True))
    run_encode(replace(config, out=str(tmp_path / "fresh")))
    updated, fresh = contents(tmp_path / "out"), contents(tmp_path / "fresh")
    assert updated == fresh
    after = times(tmp_path / "out")
    kept = [name for name in after if name.startswith("shard") and after[name] == before.get(name)]
    assert len(kept) == num_kept


def test_an_update_that_was_killed_continues(parts, tmp_path, monkeypatch):
    tree = Path(shutil.copytree(parts["images"], tmp_path / "tree"))
    config = encode_config({"images": str(tree), "texture_codec": "pixels"}, tmp_path / "out")
    run_encode(config)
    change_images(tree)

    def stop(job, shards, ranks, report):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CacheJob, "encode_shards", stop)
        with pytest.raises(KeyboardInterrupt):
            run_encode(replace(config, update=True))
    with pytest.raises(ValueError, match="is an unfinished cache"):
        LatentShards(tmp_path / "out")
    run_encode(config)
    run_encode(replace(config, out=str(tmp_path / "fresh")))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_swapped_and_duplicated_shards_are_found(encoded_cache, tmp_path):
    """All full shards have one size."""
    first, second = "shard-00001.safetensors", "shard-00002.safetensors"
    swapped = copied(encoded_cache, tmp_path / "a")
    (swapped / first).rename(swapped / "x")
    (swapped / second).rename(swapped / first)
    (swapped / "x").rename(swapped / second)
    doubled = copied(encoded_cache, tmp_path / "b")
    shutil.copy(doubled / first, doubled / second)
    for folder, name in ((swapped, first), (doubled, second)):
        with pytest.raises(ValueError, match=f"{name} is not the shard that .*manifest.json lists under its name"):
            LatentShards(folder)


def test_statistics_of_another_cache_are_found(encoded_cache, tmp_path):
    from sfd_fast.diffusion.statistics import LatentStatistics

    out = copied(encoded_cache, tmp_path)
    LatentStatistics.identity(4, 3).save(out)
    with pytest.raises(ValueError, match="latents_stats.pt is not of this cache: its manifest lists other values"):
        LatentShards(out).statistics()
