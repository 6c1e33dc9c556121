"""DALI on the CPU against the exact path, on real photographs; failures lose no image."""

import sys

import pytest
import torch
from harness.image_trees import crops, encoded, photographs, write_tree
from harness.marks import needs_dali

from sfd_fast.data.images import dali
from sfd_fast.data.images.dali import DaliDecoder, measure, read_batches_dali
from sfd_fast.data.images.decode import load
from sfd_fast.data.images.opening import open_index

MIN_PSNR = {0: 49.0, 1: 45.0, 2: 42.0, 3: 39.0, 4: 37.0}
"""dB against the exact path, by the number of halvings: each rounds to 8 bits once more"""


def jpegs(scale=1.0):
    images = photographs().values()
    return [encoded(im.resize((int(im.width * scale), int(im.height * scale))), quality=92) for im in images]


@needs_dali
@pytest.mark.parametrize(
    ("scale", "size", "halvings"), [(1, 256, 1), (2, 256, 2), (1, 128, 2), (1, 64, 3), (2.1, 64, 4), (0.8, 256, 0)]
)
def test_the_crop_differs_by_no_more_than_stated(scale, size, halvings):
    found = measure(jpegs(scale), size)
    print(f"\nDALI against PIL, {size} from photographs x {scale}: {min(found):.1f} to {max(found):.1f} dB")
    assert min(found) >= MIN_PSNR[halvings]


@needs_dali
def test_the_semvae_crop_differs_by_no_more_than_stated():
    assert min(measure(jpegs(), 224, crop="resize")) >= MIN_PSNR[0]


@needs_dali
def test_jpegs_are_decoded_to_the_same_pixels_as_with_pil():
    """An image that needs no resizing shows the decoder alone."""
    data = [encoded(im.crop((8, 16, 136, 144)), quality=q) for im, q in zip(photographs().values(), (75, 90, 98))]
    assert measure(data, 128) == [float("inf")] * 3


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """13 JPEGs, and 4 files on which decoders disagree."""
    root = tmp_path_factory.mktemp("dali")
    tree = write_tree(root / "tree")
    image = crops("china", 1)[0]
    for name, data in {
        "a.jpg": encoded(image.convert("CMYK")), "b.png": encoded(image.convert("RGBA"), "png"),
        "c.gif": encoded(image, "gif"), "d.webp": encoded(image, "webp"),
    }.items():  # fmt: skip
        (tree / "flower" / name).write_bytes(data)
    return open_index(tree, root / "out", report=lambda _: None)


@needs_dali
def test_every_image_of_every_batch_is_close_to_pil(index, caplog):
    batches = [[3, 1, 4], [0, 2], list(range(5, 17))]
    decoded = list(read_batches_dali(index, batches, 32, num_threads=1))
    for batch, images in zip(batches, decoded, strict=True):
        exact = torch.stack([load(index.read(i), 32) for i in batch])
        error = (images.double() - exact.double()).square().flatten(1).mean(1)
        assert (10 * torch.log10(255**2 / error)).min() > MIN_PSNR[3]
    assert not caplog.records, "DALI failed: PIL was compared with itself"


@needs_dali
def test_unusual_files_are_exact(index):
    unusual = [i for i in range(len(index)) if not index.plain[i]]
    assert len(unusual) == 4
    (batch,) = read_batches_dali(index, [unusual], 32)
    assert torch.equal(batch, torch.stack([load(index.read(i), 32) for i in unusual]))


@needs_dali
def test_a_failure_inside_dali_loses_no_image_and_the_next_batch_runs_again(caplog):
    """A GIF that was called plain: DALI cannot decode it and gives up the whole batch. Said once, with the cause."""
    images = crops("china", 3)
    good = [encoded(image) for image in images]
    bad = [good[0], encoded(images[1], "gif"), good[2]]
    sizes = [image.size for image in images]
    decoder = DaliDecoder(32, batch_size=3, max_halvings=4, num_threads=1)
    batch = decoder(bad, sizes, [True] * 3, "file {}".format)
    assert decoder.failures == 1
    assert torch.equal(batch, torch.stack([load(data, 32) for data in bad]))
    (record,) = caplog.records
    assert "nvImageCodec failure" in record.getMessage() and "the cause is file 1" in record.getMessage()
    again = decoder(good, sizes, [True] * 3)
    assert decoder.failures == 1
    exact = torch.stack([load(data, 32) for data in good])
    difference = (again.double() - exact.double()).abs()
    assert 0 < difference.mean() < 1.5, "equal images would be PIL's"
    decoder(bad, sizes, [True] * 3)
    assert decoder.failures == 2 and len(caplog.records) == 1


@needs_dali
def test_an_image_that_nothing_decodes_is_named_alone(index, monkeypatch):
    read = type(index).read
    monkeypatch.setattr(type(index), "read", lambda self, i: b"\xff\xd8 broken" if i == 1 else read(self, i))
    with pytest.raises(OSError, match=r"neither DALI nor PIL can decode \S*china/001.jpg: [^/]*$"):
        list(read_batches_dali(index, [[0, 1]], 32))


@needs_dali
def test_a_pipeline_that_cannot_be_built_is_an_error(index, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Assert failed: no such decoder")

    monkeypatch.setattr(dali, "build_pipeline", refuse)
    with pytest.raises(OSError, match="DALI cannot start on cpu: Assert failed: no such decoder. Use decoder=pil"):
        next(read_batches_dali(index, [[0, 1]], 32))


@needs_dali
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_missing_gpu_is_an_error(index):
    with pytest.raises(OSError, match="DALI cannot start on cuda: .*CUDA is not available"):
        next(read_batches_dali(index, [[0, 1]], 32, device="cuda"))


@needs_dali
def test_pil_is_never_measured_against_itself():
    with pytest.raises(OSError, match="DALI failed on these images: there is no difference to measure"):
        measure([encoded(crops("china", 1)[0], "gif")], 32)


@needs_dali
def test_failing_batches_are_told_to_the_caller(index, monkeypatch):
    gif = encoded(crops("china", 1)[0], "gif")
    read = type(index).read
    monkeypatch.setattr(type(index), "read", lambda self, i: gif if i == 4 else read(self, i))
    failed = []
    assert len(list(read_batches_dali(index, [[0, 1], [3, 4], [2]], 32, on_failure=failed.append))) == 3
    assert failed == [[3, 4]]


def test_without_dali_the_error_says_how_to_install_it(index, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setitem(sys.modules, "nvidia", None)
    with pytest.raises(ImportError, match="pip install nvidia-dali-cuda120"):
        list(read_batches_dali(index, [[0]], 32))


@needs_dali
@pytest.mark.gpu
def test_decoding_on_the_gpu_is_close_to_pil(index):
    found = measure(jpegs(), 256, device="cuda")
    print(f"\nDALI on the GPU against PIL: {min(found):.1f} to {max(found):.1f} dB")
    assert min(found) >= 35.0
