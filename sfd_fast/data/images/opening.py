"""The index of a source as commands open it: screened where there is none, compared with the source where there is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from sfd_fast.data.encode.options import RELEASED
from sfd_fast.data.images.changes import compare, untouched
from sfd_fast.data.images.index import INDEX_FILE, ImageIndex, absolute
from sfd_fast.data.images.listing import Scan
from sfd_fast.data.images.screening import REPORT_FILE, Finding, empty_classes, screen
from sfd_fast.data.images.sources import scan
from sfd_fast.files.home import with_home
from sfd_fast.ranks import Ranks


@with_home
def open_index(
    source: str | Path,
    folder: str | Path,
    *,
    on_bad: Literal["skip", "fail"] = "skip",
    num_threads: int = 2,
    ranks: Ranks | None = None,
    report: Callable[[str], None] = print,
    update: bool = False,
) -> ImageIndex:
    """The index of a source, kept in `folder`; screens the source where there is none yet.

    Where there is one, the source is compared with it; update: what differs is screened anew.
    Unreadable images are listed with the reason in unreadable.json: skipped, or fatal with on_bad="fail". Likewise
    classes without images, where labels come from tar shards or a dataset.
    Raises ValueError for images that differ from the index, for unreadable images where they are fatal, for a class
    that has no readable image, and for an index that belongs to another source.
    """
    ranks = ranks or Ranks()
    path = Path(folder, INDEX_FILE)
    options = {"num_threads": num_threads, "ranks": ranks, "report": report}
    screened = not all(ranks.gather(path.is_file()))
    if screened:
        screen(scan(absolute(source)), path, **options)
    index = ImageIndex.load(path)
    if index.metadata["root"] != absolute(source):
        raise ValueError(
            f"{path} is the index of {index.metadata['root']}, not of {source}: use another output folder, or delete "
            "the index if the images only moved"
        )

    def look() -> tuple[str, Scan | None, dict[int, Finding]]:
        if screened or untouched(index):
            return "", None, {}
        found = scan(absolute(source))
        changes, known = compare(found, index, num_threads)
        return (str(changes), found, known) if changes else ("", None, {})

    changes, found, known = ranks.on_first(look)
    if changes and not update:
        raise ValueError(f"{changes}: run the command again with --update to encode what differs, or restore {source}")
    if changes:
        if ranks.first:
            report(f"{source}: {changes}")
        screen(found, path, known=known, **options)
        index = ImageIndex.load(path)
    if on_bad == "fail" and index.metadata["unreadable"]:
        _refuse(index.metadata["unreadable"], path.with_name(REPORT_FILE))
    empty = empty_classes(index.labels, index.classes, index.metadata["root"])
    if on_bad == "fail" and empty:
        raise ValueError(f"{empty}. Complete the images, or pass on_bad=skip")
    return index


def _refuse(count: int, report: Path) -> None:
    bad = json.loads(report.read_text())
    name, reason = next(iter(bad.items()))
    raise ValueError(
        f"{count} images are unreadable, the first is {name} ({reason}); all are listed in {report}. Repair or remove "
        "them and delete the index, or pass on_bad=skip"
    )


def traits_of(index: ImageIndex, background: str) -> list[str]:
    """What to say of images that people and decoders see differently; nothing where there are none."""
    counts = {trait: count for trait, count in index.counts_of_traits().items() if count}
    if not counts:
        return []
    found = ", ".join(f"{count} {trait}" for trait, count in counts.items())
    done = f"turned, put on {background}, scaled to 8 bits (--background)"
    released = "read as the released trainers do, EXIF ignored, transparency dropped, 16 bits cut"
    return [f"images {found}: {released if background == RELEASED else done}"]
