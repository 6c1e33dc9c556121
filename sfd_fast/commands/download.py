"""`sfd download`: the authors' weights, ready to use in one step: fetched, checked, converted, put together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sfd_fast.config import Settings
from sfd_fast.config.checks import FilePath


@dataclass(frozen=True)
class DownloadConfig(Settings):
    """Options of `sfd download`.

    Run again after an interruption, it goes on where it broke off. HF_TOKEN gives access to private copies, HF_ENDPOINT
    names another hub.
    """

    what: Literal[
        "xl-80ep", "xl-800ep", "xxl-80ep", "xxl-800ep", "guide-60k", "guide-70k", "guide-120k", "codec", "statistics",
        "reference",
    ]  # fmt: skip
    """the first four: a whole pipeline; the others: one part (reference: ImageNet's statistics for `sfd evaluate`)"""
    out: FilePath = ""
    """folder to make; empty: released/NAME"""
    revision: str = ""
    """branch, tag or commit of the authors' repository; empty: the newest"""
    cache_dir: FilePath = ""
    """where fetched files are kept, in the authors' formats; empty: sfd_fast in the folder that HF_HOME names"""


def run_download(config: DownloadConfig) -> None:
    """Fetches and converts. Raises OSError where the hub or the disk fails, ValueError for damaged files."""
    from sfd_fast.formats.hub import download_zip
    from sfd_fast.formats.released_weights import REFERENCE_URL, VARIANTS
    from sfd_fast.sampling.sources import released_pipeline

    out = Path(config.out or f"released/{config.what}")
    if config.what in VARIANTS:
        released_pipeline(config.what, out, revision=config.revision or None, cache_dir=config.cache_dir or None)
        use = f"sfd sample --model {out} --labels 207 --show_stages"
    elif config.what == "reference":
        file = out / REFERENCE_URL.rpartition("/")[2]
        download_zip(REFERENCE_URL, file)
        use = f"sfd evaluate --reference {file} --samples ..."
    else:
        use = make_part(config, out)
    print(f"{out} is ready: {use}")


def make_part(config: DownloadConfig, out: Path) -> str:
    """One part into a folder, which it is left in where it is there. Returns the command that takes it."""
    import shutil

    from sfd_fast.formats.hub import Repository
    from sfd_fast.formats.marked_folder import WEIGHTS
    from sfd_fast.formats.released_model import convert_released
    from sfd_fast.formats.released_weights import (
        CODEC_FILE,
        CODEC_REPOSITORY,
        GUIDES,
        REPOSITORY,
        STATISTICS_FILES,
        checkpoint,
    )
    from sfd_fast.sampling.sources import convert_checkpoint

    def fetched(name: str, *paths: str, revision: str | None = config.revision or None) -> Path:
        repository = Repository(name, revision=revision, cache_dir=config.cache_dir or None)
        return repository.fetch(repository.require(paths))

    there = (out / WEIGHTS).is_file()
    if config.what in GUIDES:
        network = checkpoint(*GUIDES[config.what])
        if not there:
            convert_checkpoint(fetched(REPOSITORY, network.path) / network.path, out, network)
        return f"sfd sample --guide {out} ..."
    if config.what == "codec":
        if not there:
            file = fetched(CODEC_REPOSITORY, CODEC_FILE, revision=None) / CODEC_FILE
            convert_released(file, out, keep_training_state=False)
        return f"sfd encode --texture_codec {out} ..., sfd sample --codec {out} ..."
    folder = fetched(REPOSITORY, *STATISTICS_FILES)
    out.mkdir(parents=True, exist_ok=True)
    for name in STATISTICS_FILES:
        shutil.copyfile(folder / name, out / Path(name).name)
    return f"sfd convert --statistics {out} ..."
