"""Pictures for people: sample grids, loss curves and the three-stage strip.

Images are (N, H, W, 3) uint8. matplotlib is imported when a picture is drawn.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sfd_fast.files.atomic import write_atomically
from sfd_fast.files.home import with_home

MARK = "sfd_fast"


def enlarge(image: np.ndarray, size: int) -> np.ndarray:
    """Small images scaled up by whole pixels to about `size`, larger ones left alone."""
    factor = max(size // image.shape[0], 1)
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def tile(images: Sequence[np.ndarray], num_columns: int, *, size: int = 48, gap: int = 2) -> np.ndarray:
    """Images in rows of num_columns on white, each in a cell as large as the largest, (height, width, 3) uint8."""
    enlarged = [enlarge(image, size) for image in images]
    height, width = (max(image.shape[axis] for image in enlarged) for axis in (0, 1))
    num_rows = -(-len(enlarged) // num_columns)
    canvas = np.full((num_rows * (height + gap) - gap, num_columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(enlarged):
        top, left = i // num_columns * (height + gap), i % num_columns * (width + gap)
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def square_grid(images: Sequence[np.ndarray], **options: int) -> np.ndarray:
    """Images as a picture about as wide as it is high; options as of `tile`."""
    return tile(images, max(1, round(len(images) ** 0.5)), **options)


@with_home
def save(path: str | Path, picture: np.ndarray) -> None:
    """Writes a picture (H, W, 3) uint8, whole or not at all; the kind of file by the suffix. A PNG carries our mark."""
    mark = PngInfo()
    mark.add_text("Software", MARK)
    write_atomically(Path(path), lambda temporary: Image.fromarray(picture).save(temporary, pnginfo=mark))


def is_ours(path: Path) -> bool:
    """Whether a picture carries our mark."""
    try:
        with Image.open(path) as picture:
            return picture.info.get("Software") == MARK
    except (OSError, Image.DecompressionBombError):
        return False


def figure(width: float, height: float, **options):
    """A matplotlib figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained", **options)
    FigureCanvasAgg(made)
    return made


@with_home
def sample_grid(
    path: str | Path,
    real: np.ndarray,
    real_labels: np.ndarray,
    generated: np.ndarray,
    generated_labels: np.ndarray,
    *,
    per_class: int = 10,
) -> None:
    """One row per class: `per_class` real images on the left, as many generated ones on the right."""
    classes = np.unique(generated_labels)
    drawn = figure(11, 0.52 * len(classes) + 0.7)
    axes = drawn.subplots(1, 2)
    sources = (("real (training set)", real, real_labels), ("generated", generated, generated_labels))
    for axis, (title, images, labels) in zip(axes, sources):
        rows = [image for c in classes for image in padded(images[labels == c][:per_class], per_class)]
        picture = tile(rows, per_class)
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(title)
        axis.set_xticks([])
        step = picture.shape[0] / len(classes)
        axis.set_yticks([step * (i + 0.5) for i in range(len(classes))], [str(c) for c in classes])
        axis.tick_params(length=0)
        axis.set_frame_on(False)
    axes[0].set_ylabel("label")
    write_atomically(Path(path), lambda temporary: drawn.savefig(temporary, dpi=110))


def padded(images: np.ndarray, count: int) -> list[np.ndarray]:
    """Exactly `count` images, white ones where there are fewer."""
    blank = np.full_like(images[0], 255) if len(images) else np.full((8, 8, 3), 255, np.uint8)
    return list(images) + [blank] * (count - len(images))


@with_home
def loss_curves(path: str | Path, runs: Mapping[str, list[dict]], plain: Mapping[str, Sequence[float]]) -> None:
    """One panel a run: training loss and its terms, validation loss as points.

    runs: name -> rows of metrics.jsonl; plain: name -> loss of every step.
    """
    drawn = figure(4.2 * (len(runs) + len(plain)), 3.4)
    axes = np.atleast_1d(drawn.subplots(1, len(runs) + len(plain)))
    for axis, (name, losses) in zip(axes, plain.items()):
        axis.plot(np.arange(1, len(losses) + 1), losses, lw=0.8)
        axis.set_title(name)
    for axis, (name, rows) in zip(axes[len(plain) :], runs.items()):
        training = [row for row in rows if row["kind"] == "train"]
        validation = [row for row in rows if row["kind"] == "validation"]
        steps = [row["step"] for row in training]
        terms = ("loss", "velocity", "cosine", "repa", "mse")
        for key in (term for term in terms if training and term in training[0]):
            axis.plot(steps, [row[key] for row in training], lw=1.4 if key == "loss" else 0.8, label=key)
        if validation:
            losses = [row["loss"] for row in validation]
            axis.plot([row["step"] for row in validation], losses, "k.", ms=7, label="held-out loss")
        axis.set_title(name)
        axis.legend(fontsize=7)
    for axis in axes:
        axis.set_yscale("log")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss")
    write_atomically(Path(path), lambda temporary: drawn.savefig(temporary, dpi=110))


def principal_colours(latents: np.ndarray, reference: np.ndarray | None = None) -> np.ndarray:
    """Latents as colours: their projection on the three main directions of the reference (None: their own).

    latents, reference: (N, C, h, w).  Returns (N, h, w, 3) uint8.
    """
    reference = latents if reference is None else reference

    def rows(values: np.ndarray) -> np.ndarray:
        return values.transpose(0, 2, 3, 1).reshape(-1, values.shape[1])

    centre = rows(reference).mean(axis=0)
    directions = np.linalg.svd(rows(reference) - centre, full_matrices=False)[2][:3]
    scale = (rows(reference) - centre) @ directions.T
    low, high = np.percentile(scale, 2, axis=0), np.percentile(scale, 98, axis=0)
    colours = ((rows(latents) - centre) @ directions.T - low) / np.maximum(high - low, 1e-6)
    n, _, h, w = latents.shape
    picture = np.full((n, h, w, 3), 128, np.uint8)
    picture[..., : len(directions)] = (255 * colours.clip(0, 1)).astype(np.uint8).reshape(n, h, w, -1)
    return picture


@with_home
def stage_strip(
    path: str | Path,
    taus: Sequence[float],
    semantic: Sequence[np.ndarray],
    texture: Sequence[np.ndarray],
    labels: Sequence[int],
    delta_t: float,
) -> None:
    """Semantics (colours) above texture (decoded) for each label, from noise on the left to data on the right.

    semantic: per tau (N, C, h, w) normalised latents; texture: per tau (N, H, W, 3) uint8.
    """
    reference = semantic[-1]
    columns = [principal_colours(s, reference) for s in semantic]
    num = len(labels)
    drawn = figure(0.95 * len(taus) + 1.2, 1.75 * num + 0.9)
    axes = drawn.subplots(2 * num, len(taus), squeeze=False)
    for j, tau in enumerate(taus):
        for i in range(num):
            for k, image in enumerate((columns[j][i], texture[j][i])):
                axis = axes[2 * i + k, j]
                axis.imshow(image, interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                if j == 0:
                    axis.set_ylabel(f"{labels[i]}\nsemantic" if k == 0 else "texture", fontsize=8)
        t_tex, t_sem = max(tau - delta_t, 0.0), min(tau, 1.0)
        axes[0, j].set_title(f"{stage_name(tau, delta_t)}\nt_sem {t_sem:.2f}\nt_tex {t_tex:.2f}", fontsize=7)
    write_atomically(Path(path), lambda temporary: drawn.savefig(temporary, dpi=110))


def stage_name(tau: float, delta_t: float) -> str:
    """Which of the three stages ends at or contains tau."""
    if tau <= 0:
        return "noise"
    if delta_t > 0 and tau <= delta_t + 1e-6:
        return "I: semantics"
    if tau <= 1 + 1e-6:
        return "II: both"
    return "III: texture"
