"""Small trees of real photographs (shipped with scikit-learn and matplotlib) for tests of data preparation."""

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image


@cache
def photographs() -> dict[str, Image.Image]:
    """Three real photographs, RGB: china and flower (640 x 427), hopper (512 x 600)."""
    import matplotlib.cbook
    from sklearn.datasets import load_sample_images

    images = load_sample_images()
    found = {Path(name).stem: Image.fromarray(array) for name, array in zip(images.filenames, images.images)}
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        found["hopper"] = Image.open(io.BytesIO(file.read())).convert("RGB")
    return found


def crops(name: str, count: int, *, seed: int = 0, smallest: int = 40) -> list[Image.Image]:
    """Random rectangular crops of one photograph, different in size and shape."""
    image, random = photographs()[name], np.random.default_rng(seed)
    result = []
    for _ in range(count):
        width, height = (int(random.integers(smallest, edge)) for edge in image.size)
        left, top = int(random.integers(0, image.width - width)), int(random.integers(0, image.height - height))
        result.append(image.crop((left, top, left + width, top + height)))
    return result


def encoded(image: Image.Image, kind: str = "jpeg", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def write_tree(root: Path, counts: dict[str, int] | None = None, *, seed: int = 0) -> Path:
    """A class-per-folder tree of JPEG crops, one class per photograph."""
    for name, count in (counts or {"china": 5, "flower": 4, "hopper": 4}).items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(crops(name, count, seed=seed)):
            (root / name / f"{number:03d}.jpg").write_bytes(encoded(image, quality=90))
    return root
