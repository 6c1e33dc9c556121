"""A folder is held by one command at a time; the second is told who is there, and a killed one leaves it free."""

import contextlib
import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from sfd_fast.files.lock import FolderLock

HOLDER = """
import sys, time
from sfd_fast.files.lock import FolderLock
folder, launch = sys.argv[1:]
with FolderLock(folder, command="sfd other", advice="x", launch=launch or None, clean=lambda: print("cleaned")):
    print("inside", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def held(folder, launch=""):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder, launch], stdout=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if line == "inside\n":
                break
        yield process, lines
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def lock(folder, **options):
    return FolderLock(folder, command="sfd sample", advice="choose another folder with --out", **options)


def test_the_second_command_is_told_who_holds_the_folder(tmp_path):
    with held(tmp_path) as (process, _), pytest.raises(BlockingIOError) as refused, lock(tmp_path):
        pass
    text = str(refused.value)
    assert f"{tmp_path} is in use by `sfd other` (process {process.pid} on {socket.gethostname()}, since 20" in text
    assert text.endswith("UTC): wait for it, stop it, or choose another folder with --out")


def test_a_killed_holder_leaves_the_folder_free(tmp_path):
    with held(tmp_path) as (process, _):
        process.send_signal(signal.SIGKILL)
        process.wait()
        with lock(tmp_path):
            pass


def test_processes_of_one_launch_share_the_folder_and_the_first_alone_cleans(tmp_path):
    with held(tmp_path, "launch 1") as (_, first), held(tmp_path, "launch 1") as (_, second):
        assert (first, second) == (["cleaned", "inside"], ["inside"])
        for launch in (None, "launch 2"):
            with pytest.raises(BlockingIOError, match="in use by `sfd other`"), lock(tmp_path, launch=launch):
                pass
        with lock(tmp_path, launch="launch 1"):
            pass


def test_the_folder_stays_held_until_the_last_of_a_launch_leaves(tmp_path):
    with held(tmp_path, "a") as (first, _), held(tmp_path, "a"):
        first.kill()
        first.wait()
        with pytest.raises(BlockingIOError), lock(tmp_path, launch="b"):
            pass
    with lock(tmp_path, launch="b"):
        pass


def test_the_lock_ends_with_its_block_whatever_happens(tmp_path):
    with pytest.raises(RuntimeError), lock(tmp_path):
        raise RuntimeError
    with lock(tmp_path, clean=lambda: (tmp_path / "cleaned").touch()):
        assert (tmp_path / "cleaned").exists()


def test_a_forked_child_does_not_keep_its_parents_lock(tmp_path):
    ready, go = os.pipe()
    with lock(tmp_path):
        child = os.fork()
        if child == 0:  # outlives the block, as a loader's worker outlives a killed trainer
            os.write(go, b"x")
            time.sleep(60)
            os._exit(0)
        os.read(ready, 1)
    try:
        with lock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(go)


def test_a_file_system_without_locks_is_said_and_lets_all_in(tmp_path, monkeypatch, caplog):
    def flock(descriptor, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING), lock(tmp_path), lock(tmp_path):
        pass
    assert f"{tmp_path}: this file system has no locks; start one command at a time there" in caplog.text


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    message = "file/out cannot be written .*: choose another folder with --out"
    with pytest.raises(OSError, match=message), lock(tmp_path / "file" / "out"):
        pass
