"""Decoding as PIL-based trainers do, and the released crop pixel for pixel."""

import io

import numpy as np
import pytest
import torch
from harness.image_trees import encoded, photographs
from PIL import Image

from sfd_fast.data.images.decode import (
    DEEP,
    ROTATED,
    TRANSPARENT,
    colour,
    decode,
    decode_with_traits,
    flip_images,
    load,
    read_batches,
    square,
    to_codec,
)

BOX, BICUBIC = Image.Resampling.BOX, Image.Resampling.BICUBIC


def reference_crop(image, size):
    """The published ADM rule in NumPy terms, one step at a time."""
    halvings = 0
    width, height = image.size
    while min(width, height) // 2 >= size:
        image = image.resize((width // 2, height // 2), BOX)
        width, height = image.size
        halvings += 1
    shorter = min(width, height)
    image = image.resize((round(width * size / shorter), round(height * size / shorter)), BICUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size], halvings


@pytest.mark.parametrize(("name", "size", "halvings"), [("china", 256, 0), ("hopper", 128, 2), ("flower", 32, 3)])
def test_adm_crop_is_the_published_rule_pixel_for_pixel(name, size, halvings):
    image = photographs()[name]
    expected, steps = reference_crop(image, size)
    assert steps == halvings
    assert np.array_equal(np.asarray(square(image, size)), expected)


def test_adm_crop_enlarges_small_images():
    image = photographs()["china"].crop((0, 0, 50, 70))
    expected, _ = reference_crop(image, 64)
    assert np.array_equal(np.asarray(square(image, 64)), expected)


def test_adm_crop_of_an_image_of_the_right_size_changes_nothing():
    image = photographs()["china"].crop((5, 9, 133, 137))
    assert np.array_equal(np.asarray(square(image, 128)), np.asarray(image))


def test_resize_crop_has_the_semvae_trainings_geometry():
    image = photographs()["china"]  # 640 x 427 -> 383 x 256 -> 224 x 224 at (80, 16)
    expected = image.resize((383, 256), BICUBIC).crop((80, 16, 304, 240))
    assert np.array_equal(np.asarray(square(image, 224, "resize")), np.asarray(expected))


def small():
    return photographs()["china"].resize((40, 30))


VARIANTS = {
    "jpeg": lambda im: encoded(im),
    "progressive jpeg": lambda im: encoded(im, progressive=True),
    "grey jpeg": lambda im: encoded(im.convert("L")),
    "cmyk jpeg": lambda im: encoded(im.convert("CMYK")),
    "png": lambda im: encoded(im, "png"),
    "palette png": lambda im: encoded(im.convert("P"), "png"),
    "rgba png": lambda im: encoded(im.convert("RGBA"), "png"),
    "grey and alpha png": lambda im: encoded(im.convert("LA"), "png"),
    "1-bit png": lambda im: encoded(im.convert("1"), "png"),
    "16-bit png": lambda im: encoded(Image.fromarray(np.asarray(im.convert("L")).astype(np.uint16) * 257), "png"),
    "webp": lambda im: encoded(im, "webp", lossless=True),
    "gif": lambda im: encoded(im, "gif"),
    "animated gif": lambda im: encoded(im, "gif", save_all=True, append_images=[im.rotate(180)]),
    "animated webp": lambda im: encoded(im, "webp", save_all=True, append_images=[im.rotate(180)], lossless=True),
    "animated png": lambda im: encoded(im, "png", save_all=True, append_images=[im.rotate(180)]),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_every_kind_of_file_is_what_pil_makes_of_it(kind):
    data = VARIANTS[kind](small())
    out = decode(data)
    assert out.mode == "RGB" and out.size == (40, 30)
    assert np.array_equal(np.asarray(out), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_an_animation_is_its_first_frame():
    data = VARIANTS["animated webp"](small())
    assert np.array_equal(np.asarray(decode(data)), np.asarray(small()))


def test_exif_rotation_is_ignored_as_in_the_released_preprocessing():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert decode(encoded(small(), exif=exif)).size == (40, 30)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "palette png"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_truncated_image_is_an_error_never_grey_pixels(kind, keep):
    data = VARIANTS[kind](photographs()["flower"])
    with pytest.raises((OSError, ValueError)):
        decode(data[: int(len(data) * keep)])


def test_bytes_that_are_no_image_are_an_error():
    with pytest.raises(OSError, match="no image that PIL can identify"):
        decode(b"hello")


def test_batches_come_in_order_whatever_the_threads():
    data = [encoded(photographs()["china"].crop((i, i, i + 60, i + 50))) for i in range(9)]
    order = [[3, 1, 4], [1, 5], [8, 2, 6, 7]]
    runs = [
        list(read_batches(data.__getitem__, order, 16, num_threads=threads, num_ahead=ahead))
        for threads, ahead in ((1, 0), (2, 2), (4, 9))
    ]
    for batches in runs:
        for batch, numbers in zip(batches, order, strict=True):
            assert torch.equal(batch, torch.stack([load(data[i], 16) for i in numbers]))


def test_an_unreadable_image_in_a_batch_raises():
    with pytest.raises(OSError):
        list(read_batches([b"x"].__getitem__, [[0]], 16))


def test_codec_range_is_minus_one_to_one():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1).expand(1, 1, 2, 3)
    assert to_codec(images)[0, :, 0].tolist() == [[-1.0, 1.0]] * 3
    assert to_codec(images).shape == (1, 3, 1, 2)


def test_flip_mirrors_left_and_right():
    image = torch.arange(12, dtype=torch.uint8).view(1, 2, 2, 3)
    assert torch.equal(flip_images(image)[0, :, 0], image[0, :, 1])


WHITE, BLUE = (255, 255, 255), (0, 0, 255)


def test_transparency_shows_the_background():
    """Red of half opacity over white: 255, 128, 128; where nothing is opaque, the background alone."""
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    image.putpixel((1, 0), (9, 9, 9, 0))
    shown, traits = decode_with_traits(encoded(image, "png"), WHITE)
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(255, 127, 127), WHITE] and traits == {TRANSPARENT}
    assert decode(encoded(image, "png"), BLUE).getpixel((1, 0)) == BLUE
    assert decode(encoded(image, "png")).getpixel((1, 0)) == (9, 9, 9), "the released trainers drop transparency"
    palette = image.convert("RGB").quantize(4)
    palette.info["transparency"] = palette.getpixel((1, 0))
    assert decode(encoded(palette, "png", transparency=palette.getpixel((1, 0))), BLUE).getpixel((1, 0)) == BLUE
    assert decode_with_traits(encoded(Image.new("RGBA", (2, 2), (1, 2, 3, 255)), "png"), WHITE)[1] == set()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_or_ignored_as_asked(orientation):
    image, exif = small(), Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "png", exif=exif)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Image.Transpose
    expected = image.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else image
    shown, traits = decode_with_traits(data, WHITE)
    assert np.array_equal(np.asarray(shown), np.asarray(expected))
    assert traits == ({ROTATED} if orientation > 1 else set())
    assert np.array_equal(np.asarray(decode(data)), np.asarray(image))


def test_sixteen_bits_are_scaled_to_eight():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    shown, traits = decode_with_traits(encoded(Image.fromarray(values), "png"), WHITE)
    assert np.asarray(shown)[0, :, 0].tolist() == [0, 1, 128, 255] and traits == {DEEP}
    assert np.asarray(decode(encoded(Image.fromarray(values), "png")))[0, :, 0].tolist() == [0, 255, 255, 255]


@pytest.mark.parametrize(
    ("values", "message"),
    [(np.array([[0.0, 0.5, 1.0]], np.float32), "floating point"), (np.array([[0, 70_000]], np.int32), "0 to 70000"),
     (np.array([[-1, 5]], np.int32), "-1 to 5")],
)  # fmt: skip
def test_values_whose_range_nothing_tells_are_refused(values, message):
    """A scientific TIFF of numbers between 0 and 1 would be an image of black."""
    data = encoded(Image.fromarray(values), "tiff")
    with pytest.raises(ValueError, match=message):
        decode(data, WHITE)
    assert decode(data).mode == "RGB"  # as the released trainers read it


def test_an_unknown_background_is_named():
    assert colour("white") == WHITE and colour("#0000ff") == BLUE
    with pytest.raises(ValueError, match="background 'whitish' is no colour: give a name"):
        colour("whitish")


@pytest.mark.parametrize("shape", [(1, 10_000), (10_000, 1), (4, 2048)])
def test_thin_images_are_cropped_before_they_are_enlarged(shape, monkeypatch):
    """The centre of a 1 x 10000 image at 256 is 256 equal columns of one pixel's neighbourhood; no image of 2.5 million
    columns is made. Compared with enlarging a stretch around the centre."""
    rows = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image, largest = Image.fromarray(rows), []
    resize = Image.Image.resize

    def watched(self, size, *options, **more):
        largest.append(max(size))
        return resize(self, size, *options, **more)

    monkeypatch.setattr(Image.Image, "resize", watched)
    made = np.asarray(square(image, 64))
    assert made.shape == (64, 64, 3) and max(largest) <= 64
    short, long = min(shape), max(shape)
    middle = slice(long // 2 - 5 * short, long // 2 + 5 * short)
    part = Image.fromarray(rows[middle] if shape[0] == long else rows[:, middle])
    expected = np.asarray(square(part, 64))
    assert np.abs(made.astype(int) - expected).max() <= 2
