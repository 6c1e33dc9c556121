"""inception.py and weights.py: the graph against a second implementation, and what weights files may do wrong."""

import hashlib

import numpy as np
import pytest
import torch
from harness.naive_evaluation import NaiveInception, legacy_resize, random_inception_weights

from sfd_fast.evaluation import inception, weights
from sfd_fast.evaluation.features import InceptionFeatures
from sfd_fast.evaluation.inception import Inception
from sfd_fast.evaluation.weights import WEIGHTS_NAME, find_weights, load_inception


@pytest.fixture(scope="module")
def state():
    return random_inception_weights()


@pytest.fixture(scope="module")
def weights_file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / WEIGHTS_NAME
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 40, 24, 3), dtype=np.uint8))


def test_parameter_names_and_shapes_are_those_of_the_published_file():
    graph = NaiveInception()
    graph(torch.zeros(1, 3, 299, 299, device="meta"))
    own = {name: tuple(t.shape) for name, t in Inception().state_dict().items() if "num_batches_tracked" not in name}
    assert own == graph.shapes
    # torchvision's Inception v3 without its auxiliary head has 21,785,568 parameters below the classifier
    assert sum(p.numel() for p in Inception().parameters()) == 21_785_568 + 2048 * 1008 + 1008


@pytest.mark.parametrize("size", [(5, 9), (13, 4), (8, 8)])
def test_legacy_resize_equals_the_rule_pixel_by_pixel(size):
    image = np.random.default_rng(1).random((*size, 3))
    ours = inception.legacy_resize(torch.from_numpy(image).permute(2, 0, 1)[None], 8)[0].permute(1, 2, 0)
    np.testing.assert_allclose(ours.numpy(), legacy_resize(image, 8), atol=1e-12)


def test_legacy_resize_has_no_half_pixel_centres():
    ramp = torch.arange(256.0).expand(1, 1, 256, 256)
    resized = inception.legacy_resize(ramp)[0, 0, 0]
    torch.testing.assert_close(resized[:256], torch.arange(256) * (256 / 299), rtol=1e-6, atol=1e-5)
    assert resized[-1] == 255  # clamped at the border, not extrapolated


def test_network_equals_the_second_implementation(state, weights_file, images):
    extractor = InceptionFeatures(str(weights_file))
    ours = extractor(images)
    pixels = np.stack([legacy_resize(image, 299) for image in images.double().numpy()])
    pool, spatial, logits = NaiveInception(state)(torch.from_numpy((pixels - 128) / 128).permute(0, 3, 1, 2))
    assert ours.pool.shape == (2, 2048)
    assert ours.spatial.shape == (2, 2023)
    for mine, naive in ((ours.pool, pool), (ours.spatial, spatial), (extractor.logits(ours.pool), logits)):
        assert naive.std() > 0.01  # the comparison is of values that vary
        torch.testing.assert_close(mine.double(), naive, rtol=1e-3, atol=1e-4 * naive.abs().max().item())


def test_features_ignore_autocast_and_training_mode(weights_file, images):
    extractor = InceptionFeatures(str(weights_file))
    expected = extractor(images).pool
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = extractor.train()(images).pool
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, expected)


def test_weights_load_with_and_without_batch_norm_counters(state, weights_file, tmp_path):
    network, source = load_inception(str(weights_file))
    assert torch.equal(network.Mixed_6d.branch1x1.conv.weight, state["Mixed_6d.branch1x1.conv.weight"])
    assert source["sha256"] == hashlib.sha256(weights_file.read_bytes()).hexdigest()
    assert source["published"] is False
    with_counters = tmp_path / "counters.pth"
    torch.save(network.state_dict(), with_counters)
    again, _ = load_inception(str(with_counters))
    assert torch.equal(again.Mixed_7c.branch_pool.bn.running_var, state["Mixed_7c.branch_pool.bn.running_var"])


def test_default_place_is_the_cache_of_torch_hub(weights_file, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        ValueError, match=f"no Inception weights at .*{WEIGHTS_NAME}.*--weights download.*--features digits"
    ):
        find_weights()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / WEIGHTS_NAME).symlink_to(weights_file)
    assert find_weights() == tmp_path / "checkpoints" / WEIGHTS_NAME


def test_download_verifies_the_checksum_and_says_where_it_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    remote = tmp_path / "remote.pth"
    remote.write_bytes(b"weights")
    monkeypatch.setattr(weights, "WEIGHTS_URL", remote.as_uri())
    with pytest.raises(ValueError, match="could not download .*hash.*give its path as --weights"):
        find_weights("download")
    monkeypatch.setattr(weights, "WEIGHTS_SHA256_PREFIX", hashlib.sha256(b"weights").hexdigest()[:8])
    assert find_weights("download").read_bytes() == b"weights"


def test_weights_of_another_network_name_what_is_wrong(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(1000, 2048), "AuxLogits.fc.bias": torch.zeros(3)}, path)
    # 94 units of 5 tensors and fc.bias are missing, one name is unknown, one shape is wrong
    with pytest.raises(
        ValueError, match=r"does not hold the 2015 Inception network: 473 entries.*Wanted: pt_inception-2015"
    ):
        load_inception(str(path))


def test_truncated_weights_are_refused_with_their_checksum(weights_file, tmp_path):
    path = tmp_path / "cut.pth"
    path.write_bytes(weights_file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"cut.pth \(SHA-256 [0-9a-f]{64}\) cannot be read as PyTorch weights"):
        load_inception(str(path))


@pytest.mark.gpu
def test_cuda_equals_cpu_even_where_tf32_is_on(weights_file, images, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32")
    expected = InceptionFeatures(str(weights_file))(images)
    ours = InceptionFeatures(str(weights_file)).cuda()(images.cuda())
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"  # restored
    torch.testing.assert_close(ours.pool.cpu(), expected.pool, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.spatial.cpu(), expected.spatial, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("content", [[1, 2], {1: 2, "a": None}, {"Conv2d_1a_3x3.conv.weight": "text"}, "text"])
def test_trees_that_are_no_weights_are_one_line(tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="odd.pth does not hold the 2015 Inception network") as error:
        load_inception(str(tmp_path / "odd.pth"))
    assert "\n" not in str(error.value)
