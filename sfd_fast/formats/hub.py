"""Files from the Hugging Face hub: only those that are named, continued where they broke off, checked by size and hash.

    CACHE/OWNER--NAME/COMMIT/PATH       a file, checked; PATH.part while it arrives
    CACHE/OWNER--NAME/refs/REVISION     the commit that a revision meant when the hub was last asked

CACHE is cache_dir, or `sfd_fast` in the folder that HF_HOME names. HF_ENDPOINT names another hub.
"""

import hashlib
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.request import Request, urlopen

from sfd_fast.config import require
from sfd_fast.files.atomic import write_atomically
from sfd_fast.files.digest import file_digest
from sfd_fast.files.home import with_home
from sfd_fast.files.messages import first_line

PART = ".part"
TIMEOUT_S = 30
log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub describes it."""

    path: str
    size: int
    sha256: str
    """of large files (LFS); empty for the others, which have `blob`"""
    blob: str
    """git's SHA-1 of a file's content"""


class Repository:
    """A repository of the hub at one revision. token: as huggingface_hub takes it; cache_dir: where files are kept."""

    @with_home
    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        from huggingface_hub import HfApi, constants

        self.name, self.token, self.revision = name, token, revision or "main"
        self.endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
        self.api = HfApi(endpoint=self.endpoint, token=token)
        self.cache = Path(cache_dir or Path(constants.HF_HOME, "sfd_fast"))
        self.commit = self._commit()
        self.folder = self._own / self.commit

    @property
    def _own(self) -> Path:
        return self.cache / self.name.replace("/", "--")

    def _commit(self) -> str:
        """The commit of the revision, or where the hub cannot be asked the one that it was last time."""
        noted = self._own / "refs" / self.revision.replace("/", "--")
        try:
            commit = self._ask(lambda: self.api.model_info(self.name, revision=self.revision).sha)
        except OSError as error:
            if not noted.is_file():
                raise
            log.info("%s; using what was fetched of %s before", error, self.name)
            return noted.read_text().strip()
        write_atomically(noted, f"{commit}\n")
        return commit

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        try:
            return question()
        except ValueError:
            raise
        except Exception as error:  # the hub's client raises many kinds: no network, no such repository, no permission
            raise OSError(f"{self.name} cannot be fetched from {self.endpoint}: {first_line(error)}") from error

    def find(self, paths: Iterable[str]) -> list[RemoteFile]:
        """Those of the named files that the repository has, in the order of the names."""
        paths = list(paths)
        infos = self._ask(lambda: self.api.get_paths_info(self.name, paths, revision=self.commit))
        files = {info.path: info for info in infos if hasattr(info, "blob_id")}
        return [
            RemoteFile(path, files[path].size, files[path].lfs.sha256 if files[path].lfs else "", files[path].blob_id)
            for path in paths
            if path in files
        ]

    def require(self, paths: Iterable[str]) -> list[RemoteFile]:
        """The named files; FileNotFoundError names the first that is missing and what stands in its folder."""
        paths = list(paths)
        files = self.find(paths)
        missing = [path for path in paths if path not in {file.path for file in files}]
        if missing:
            folder = str(PurePosixPath(missing[0]).parent)
            try:
                there = sorted(entry.path for entry in self.api.list_repo_tree(self.name, folder, revision=self.commit))
            except Exception:  # the folder is missing too
                there = []
            raise FileNotFoundError(
                f"{self.name} has no {missing[0]} at revision {self.revision}; {folder} holds "
                f"{', '.join(there[:10]) or 'nothing'}: its layout may have changed, so fetch the file by hand and use "
                "`sfd convert`"
            )
        return files

    def missing(self, files: Iterable[RemoteFile]) -> list[RemoteFile]:
        """Files that are not here yet."""
        return [file for file in files if not (self.folder / file.path).is_file()]

    def fetch(self, files: Iterable[RemoteFile]) -> Path:
        """Brings files here and returns the folder that holds them under their paths.

        Several processes may ask at once: one fetches, the others wait. Raises OSError where the hub or the disk fails
        (the next call goes on from there), ValueError for content that is not what the hub describes.
        """
        from huggingface_hub.utils import WeakFileLock

        if not self.missing(files):
            return self.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(self.folder / ".lock"):
            missing = self.missing(files)
            require_space(self.folder, sum(file.size for file in missing))
            if missing:
                size = sum(file.size for file in missing) / 1e9
                log.info("fetching %d file(s), %.2f GB, of %s into %s", len(missing), size, self.name, self.folder)
            for file in missing:
                self._fetch(file)
        return self.folder

    def _fetch(self, file: RemoteFile) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        path = PurePosixPath(file.path)
        require(not path.is_absolute() and ".." not in path.parts, f"{self.name} names {file.path}, outside itself")
        url = hf_hub_url(self.name, file.path, revision=self.commit, endpoint=self.endpoint)
        self._ask(
            lambda: download(url, self.folder / path, file.size, lambda part: check(part, file, self.name),
                             build_hf_headers(token=self.token))
        )  # fmt: skip


def push_folder(
    folder: Path,
    name: str,
    *,
    message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads a folder as the repository "owner/name", made where there is none; the address of the commit.

    A repository without a README.md gets a short one. Raises OSError where the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi, constants

    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
    api = HfApi(endpoint=endpoint, token=token)
    try:
        name = api.create_repo(name, private=private, exist_ok=True).repo_id
        if not api.file_exists(name, "README.md"):
            (folder / "README.md").write_text(CARD.format(name=name))
        return str(
            api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, create_pr=create_pr).commit_url
        )
    except Exception as error:  # the hub's client raises many kinds: no network, no permission, a bad name
        raise OSError(f"{name} cannot be uploaded to {endpoint}: {first_line(error)}") from error


CARD = """---
library_name: sfd-fast
tags:
- image-generation
- semantics-first-diffusion
---
# {name}

A class-conditional model of Semantics-First Diffusion (arXiv 2512.04926).

```python
from sfd_fast import SFDPipeline

pipeline = SFDPipeline.from_pretrained("{name}")
pipeline([0], seed=0).images[0].save("image.png")
```
"""


def check(path: Path, file: RemoteFile, name: str) -> None:
    """Raises ValueError where a file's content is not what the hub describes."""
    if file.sha256:
        kind, expected, found = "SHA-256", file.sha256, file_digest(path)
    else:
        content = path.read_bytes()
        kind, expected = "git's SHA-1", file.blob
        found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise ValueError(
            f"{name}/{file.path} arrived damaged: its {kind} is {found}, the hub says {expected}; start again"
        )


def download(
    url: str, target: Path, size: int, check: Callable[[Path], None], headers: dict[str, str] | None = None
) -> None:
    """Fetches an address into a file that appears when it is complete and checked; a part of it is continued.

    check(path) raises ValueError for wrong content, which is then thrown away. Raises what the hub's client raises.
    """
    from huggingface_hub.file_download import http_get

    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + PART)
    if part.is_file() and part.stat().st_size > size:
        part.unlink()
    with part.open("ab") as file:
        http_get(
            url, file, resume_size=file.tell(), headers=headers, expected_size=size, displayed_filename=target.name
        )
    try:
        check(part)
    except ValueError:
        part.unlink()
        raise
    part.replace(target)


def download_zip(url: str, target: Path) -> None:
    """Fetches a zip or npz file whose size and hash nobody publishes: the server says its size, the file its CRCs.

    Raises OSError where the server or the disk fails (the next call goes on from there), ValueError for damage.
    """
    if target.is_file():
        return

    def check_archive(path: Path) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except zipfile.BadZipFile:
            damaged = "its directory"
        require(damaged is None, f"{url} arrived damaged ({damaged}); start again")

    try:
        with urlopen(Request(url, method="HEAD"), timeout=TIMEOUT_S) as answer:
            size = int(answer.headers["Content-Length"])
        require_space(target.parent, size)
        download(url, target, size, check_archive)
    except ValueError:
        raise
    except Exception as error:  # the client raises many kinds
        raise OSError(f"{url} cannot be fetched: {first_line(error)}") from error


def require_space(folder: Path, size: int) -> None:
    """Raises OSError where so many bytes do not fit on the disk of a folder."""
    folder = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(
            f"{size / 1e9:.2f} GB are needed in {folder}, where {free / 1e9:.2f} GB are free: free some, or choose "
            "another place (--cache_dir, --out)"
        )
