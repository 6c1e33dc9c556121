"""evaluate.py, evaluator.py, features.py and images.py: from files to metrics.json, and ten and more kinds of bad
input."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import naive_evaluation as naive
from PIL import Image

from sfd_fast.commands import evaluate
from sfd_fast.commands.evaluate import EvaluateConfig, run_evaluate
from sfd_fast.evaluation import (
    Evaluator,
    EvaluatorConfig,
    Features,
    build_extractor,
)
from sfd_fast.evaluation.images import open_images, read_ahead
from sfd_fast.evaluation.statistics import load_statistics
from sfd_fast.evaluation.weights import WEIGHTS_NAME
from sfd_fast.ranks import Ranks


def digits(num_images, seed, *, size=16):
    """Smooth random pictures, uint8 (N, size, size, 3): like enlarged digits."""
    rng = np.random.default_rng(seed)
    means = 60 * rng.random((4, 8, 8)) + 60 + 5 * (seed % 3)
    small = means[rng.integers(0, 4, num_images)] + 25 * rng.standard_normal((num_images, 8, 8))
    small = small.clip(0, 255).astype(np.uint8)
    return small.repeat(size // 8, 1).repeat(size // 8, 2)[..., None].repeat(3, 3)


def write_npz(path, images, **arrays):
    np.savez(path, arr_0=images, **arrays)
    return str(path)


def write_folder(path, images):
    for i, image in enumerate(images):
        target = path / f"class{i % 3}" / f"{i:04d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(target)
    return str(path)


@pytest.fixture
def config(tmp_path):
    return digits_config(tmp_path)


def digits_config(folder):
    """80 samples against 90 reference images, by their pixels."""
    return EvaluateConfig(
        samples=write_npz(folder / "samples.npz", digits(80, 1)),
        reference=write_npz(folder / "reference.npz", digits(90, 2)),
        features="digits",
        batch_size=32,
        kid_num_subsets=4,
        kid_subset_size=60,
        output=str(folder / "out" / "metrics.json"),
        device="cpu",
        progress=False,
    )


def pictures(num_images, seed):
    """Random colour mosaics of 2 to 16 tiles a side: images that a random network tells apart. uint8 (N, 16, 16, 3)."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(num_images):
        tiles = int(rng.choice([2, 4, 8, 16]))
        mosaic = rng.random((tiles, tiles, 3)) * rng.random(3) * 255
        images.append(mosaic.repeat(16 // tiles, 0).repeat(16 // tiles, 1))
    return np.stack(images).astype(np.uint8)


@pytest.fixture(scope="module")
def inception_state():
    """Random weights with a classifier that looks away from what all images share, or one class would win
    everywhere."""
    state = naive.random_inception_weights(seed=1)
    shared = naive.NaiveInception(state)(torch.zeros(1, 3, 299, 299, dtype=torch.float64))[0][0].float()
    classifier = state["fc.weight"]
    state["fc.weight"] = 5 * (classifier - torch.outer(classifier @ shared, shared) / shared.square().sum())
    return state


@pytest.fixture(scope="module")
def inception_weights(inception_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / WEIGHTS_NAME
    torch.save(inception_state, path)
    return str(path)


def pixels(images):
    return images[:, ::2, ::2, 0].reshape(len(images), 64) / 255


def test_metrics_of_pixels_equal_the_definitions(config):
    metrics = run_evaluate(config)["metrics"]
    real, fake = pixels(digits(90, 2)), pixels(digits(80, 1))
    precision, recall = naive.precision_recall(real, fake, k=3)
    assert metrics["fd_digits"] == pytest.approx(naive.frechet_distance(fake, real), rel=1e-5)
    assert (metrics["precision"], metrics["recall"]) == pytest.approx((precision, recall))
    assert 0 < precision < 1
    assert metrics["kd_digits"] == pytest.approx(naive.kernel_distance(real[:80], fake), rel=0.5)


def test_inception_metrics_equal_the_definitions_on_random_weights(tmp_path, inception_state, inception_weights):
    """All five figures of the evaluator, from image files through the network to the numbers, against fp64 NumPy."""
    real, fake = pictures(5, 9), pictures(6, 10)
    config = EvaluateConfig(
        samples=write_npz(tmp_path / "fake.npz", fake),
        reference=write_npz(tmp_path / "real.npz", real),
        weights=inception_weights,
        metrics=("fid", "sfid", "inception_score", "precision", "recall"),
        distance_precision="float32",
        batch_size=4,
        split_size=4,
        num_neighbors=1,
        output=str(tmp_path / "metrics.json"),
        device="cpu",
        progress=False,
    )
    report = run_evaluate(config)
    real_pool, real_spatial, _ = naive.inception_features(inception_state, real)
    fake_pool, fake_spatial, fake_logits = naive.inception_features(inception_state, fake)
    precision, recall = naive.precision_recall(real_pool, fake_pool, k=1)
    expected = {
        "fid": naive.frechet_distance(fake_pool, real_pool),
        "sfid": naive.frechet_distance(fake_spatial, real_spatial),
        "inception_score": naive.inception_score(fake_logits, 4),
        "precision": precision,
        "recall": recall,
    }
    metrics = {name: value for name, value in report["metrics"].items() if not name.endswith("_std")}
    assert metrics == pytest.approx(expected, rel=1e-3)
    assert metrics["inception_score"] > 1.2
    assert 0 < metrics["precision"] < 1
    assert 0 < metrics["recall"] < 1
    assert any("not the published ones" in warning for warning in report["warnings"])
    assert any("6 sample images give a singular covariance of 2048" in warning for warning in report["warnings"])


@pytest.mark.parametrize(("kind", "rounded"), [("inception", True), ("digits", False)])
def test_distances_are_rounded_as_the_evaluator_does_for_its_features_only(config, kind, rounded):
    """64 values near 5: the norms of 1,600 have steps of 1 in float16, the squared distances are about 128."""
    evaluator = Evaluator(config)
    evaluator.config = replace(config, features=kind)
    rng = np.random.default_rng(0)
    real, fake = (5 + rng.standard_normal((count, 64)).astype(np.float32) for count in (90, 80))
    evaluator.reference_rows = torch.from_numpy(real)
    evaluator.wanted = ["precision", "recall"]
    evaluator.samples.pool.update(torch.from_numpy(fake))
    evaluator.samples.rows = [torch.from_numpy(fake)]
    metrics = evaluator.compute()
    exact, half = (naive.precision_recall(real, fake, k=3, half=half) for half in (False, True))
    assert exact != half
    assert (metrics["precision"], metrics["recall"]) == pytest.approx(half if rounded else exact)


def test_report_and_table_say_what_was_compared(config, capsys):
    report = run_evaluate(config)
    assert json.loads(Path(config.output).read_text()) == json.loads(json.dumps(report))
    assert report["samples"] == {"path": config.samples, "num_images": 80, "height": 16, "width": 16}
    assert report["reference"]["statistics"] == "computed from its images"
    assert report["skipped"]["inception_score"] == "digits features have no class scores"
    printed = capsys.readouterr().out
    assert re.search(r"fd_digits +\d+\.\d{5} +Frechet distance of 8 x 8 pixels, lower is better", printed)
    assert re.search(r"kd_digits +-?\d+\.\d{5} +\d+\.\d{5} +kernel distance", printed)
    assert re.search(r"sfid +left out +digits features have no spatial part", printed)


def test_folder_and_npz_of_the_same_images_agree(config, tmp_path):
    from_npz = run_evaluate(config)["metrics"]
    folder = replace(config, samples=write_folder(tmp_path / "png", digits(80, 1)))
    from_folder = run_evaluate(folder)["metrics"]
    for name in ("fd_digits", "precision", "recall"):  # KID draws subsets, and a folder is read in an order of its own
        assert from_folder[name] == pytest.approx(from_npz[name], rel=1e-9)


def test_folder_order_is_fixed_and_mixes_the_classes(tmp_path):
    folder = write_folder(tmp_path / "png", digits(30, 1))
    order = [path.parent.name for path in open_images(folder).paths]
    assert order == [path.parent.name for path in open_images(folder).paths]
    assert len(set(order[:8])) == 3  # sorted by name the first ten would be of class 0


def test_a_number_of_images_takes_the_first_ones(config, tmp_path):
    first = run_evaluate(replace(config, num_images=50, kid_subset_size=40))["metrics"]
    alone = replace(config, samples=write_npz(tmp_path / "fifty.npz", digits(80, 1)[:50]), kid_subset_size=40)
    assert first == run_evaluate(alone)["metrics"]


def test_stored_statistics_replace_the_reference_images(config, tmp_path):
    path = tmp_path / "statistics.npz"
    expected = run_evaluate(replace(config, save_statistics=str(path)))
    report = run_evaluate(replace(config, reference=str(path)))
    assert report["metrics"] == {"fd_digits": pytest.approx(expected["metrics"]["fd_digits"], rel=1e-12)}
    assert report["reference"] == {"path": str(path), "statistics": "stored in the file"}
    assert report["skipped"]["precision"] == "the reference has statistics but no images (arr_0)"


def test_a_reference_batch_with_statistics_gives_them_to_fid_and_its_images_to_precision(config, tmp_path):
    """As OpenAI's batches: mu and sigma of the whole training set beside 10,000 images."""
    mean, covariance = pixels(digits(500, 5)).mean(0), np.cov(pixels(digits(500, 5)), rowvar=False)
    path = write_npz(tmp_path / "both.npz", digits(90, 2), mu=mean, sigma=covariance)
    report = run_evaluate(replace(config, reference=path, num_reference=70))
    fake = pixels(digits(80, 1))
    assert report["metrics"]["fd_digits"] == pytest.approx(
        naive.frechet_distance(fake, pixels(digits(500, 5))), rel=1e-5
    )
    expected = naive.precision_recall(pixels(digits(90, 2)[:70]), fake, k=3)
    assert (report["metrics"]["precision"], report["metrics"]["recall"]) == pytest.approx(expected)


def test_an_evaluator_serves_one_checkpoint_after_another(config):
    """During training: images in any batches, results, reset, the next images; the reference is read once."""
    settings = {name: getattr(config, name) for name in EvaluatorConfig.__dataclass_fields__}
    evaluator = Evaluator(EvaluatorConfig(**settings))
    for seed in (7, 1):
        evaluator.reset()
        for batch in torch.from_numpy(digits(80, seed)).split(33):
            evaluator.update(batch)
        metrics = evaluator.compute()
    expected = run_evaluate(config)["metrics"]
    assert metrics == pytest.approx(expected, rel=1e-6)


class Unportable(Exception):
    """Cannot be unpickled: its arguments are not kept."""

    def __init__(self, first, second):
        super().__init__(first)


def _on_rank(rank, folder, config):
    """One of two processes: an evaluation, then what fails on rank 0."""

    def fail(error):
        raise error

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        result = {"metrics": run_evaluate(config)["metrics"], "failures": []}
        for error in (ValueError("bad"), OSError(28, "No space left on device"), Unportable("odd", 2)):
            try:
                Ranks.of_group().on_first(lambda error=error: fail(error))
            except Exception as caught:
                result["failures"].append([type(caught).__name__, str(caught)])
        result["after"] = Ranks.of_group().on_first(lambda: 7)
        (folder / f"rank{rank}.json").write_text(json.dumps(result))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(configuration, results of rank 0 and rank 1)."""
    folder = tmp_path_factory.mktemp("two")
    config = replace(digits_config(folder), num_reference=70)  # all of the first's share, a part of the second's
    torch.multiprocessing.spawn(_on_rank, (folder, config), nprocs=2)
    return config, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_give_the_figures_of_one(two):
    config, results = two
    expected = run_evaluate(config)["metrics"]
    first = naive.precision_recall(pixels(digits(90, 2))[:70], pixels(digits(80, 1)), k=3)
    assert (expected["precision"], expected["recall"]) == pytest.approx(first)
    for result in results:
        assert result["metrics"] == pytest.approx(expected, rel=1e-6)


def test_whatever_fails_on_rank_0_fails_on_all(two):
    _, (first, second) = two
    full = ["OSError", "[Errno 28] No space left on device"]
    assert first["failures"] == [["ValueError", "bad"], full, ["Unportable", "odd"]]
    assert second["failures"] == [["ValueError", "bad"], full, ["RuntimeError", "Unportable on rank 0: odd"]]
    assert first["after"] == second["after"] == 7


@pytest.mark.parametrize("output", ["folder", "file/metrics.json"])
def test_an_output_that_cannot_be_written_is_an_error_at_once(config, tmp_path, output, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr("sfd_fast.evaluation.images.open_images", None)
    with pytest.raises(OSError, match=f"--output .*{output} cannot be written .*choose another file"):
        run_evaluate(replace(config, output=str(tmp_path / output)))


def test_figures_are_printed_before_they_are_written(config, monkeypatch, capsys):
    def full(path, write):
        raise OSError(f"{path} could not be written (No space left on device)")

    monkeypatch.setattr(evaluate, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        run_evaluate(config)
    assert re.search(r"fd_digits +\d+\.\d{5}", capsys.readouterr().out)


@pytest.mark.gpu
def test_a_gpu_gives_the_figures_of_the_cpu(config):
    expected = run_evaluate(config)["metrics"]
    assert run_evaluate(replace(config, device="cuda"))["metrics"] == pytest.approx(expected, rel=1e-4)


def test_digits_features_are_the_pixels_of_an_enlarged_picture():
    small = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    enlarged = small.repeat(4, 1).repeat(4, 2)[..., None].repeat(3, 3)
    features = build_extractor("digits")(torch.from_numpy(enlarged))
    np.testing.assert_allclose(features.pool.numpy(), small.reshape(3, 64) / 255, rtol=1e-6)
    assert features.spatial is None


def test_dinov2_features_are_the_class_token_of_images_resized_by_pillow(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224, "patch_size": 14}
    model = Dinov2Model(Dinov2Config(**size)).eval()
    model.save_pretrained(tmp_path / "dino")
    extractor = build_extractor("dinov2", str(tmp_path / "dino"))
    images = np.random.default_rng(1).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    resized = np.stack([np.asarray(Image.fromarray(i).resize((224, 224), Image.Resampling.BICUBIC)) for i in images])
    standard = (resized / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.inference_mode():
        hidden = model(torch.from_numpy(standard).permute(0, 3, 1, 2).float()).last_hidden_state
    assert extractor.num_features == 32
    # Pillow rounds between its two passes: single pixels differ by one level
    torch.testing.assert_close(extractor(torch.from_numpy(images)).pool, hidden[:, 0], rtol=1e-3, atol=5e-3)


def truncate(path):
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])


def damage(path):
    data = bytearray(Path(path).read_bytes())
    data[5000] ^= 255
    Path(path).write_bytes(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "absent", "absent does not exist: give an npz file with arr_0 or a folder of images"),
        (
            lambda p: (p / "empty").mkdir() or p / "empty",
            r"empty holds no images \(.png, .*not in its subfolders either",
        ),
        (lambda p: (p / "a.txt").write_text("x") and p / "a.txt", "a.txt is neither a folder nor an npz file"),
        (
            lambda p: np.savez(p / "k.npz", images=digits(4, 0)) or p / "k.npz",
            "has no arr_0 but images: write uint8 images",
        ),
        (lambda p: write_npz(p / "f.npz", digits(4, 0) / 255), "arr_0 is float64, but images must be uint8 in"),
        (
            lambda p: write_npz(p / "c.npz", digits(4, 0).transpose(0, 3, 1, 2)),
            r"shape \(4, 3, 16, 16\), but images must be",
        ),
        (lambda p: write_npz(p / "g.npz", np.asfortranarray(digits(4, 0))), "in Fortran order, but images must be"),
        (lambda p: write_npz(p / "z.npz", digits(4, 0)[:0]), r"holds no images \(shape \(0, 16, 16, 3\)\)"),
        (
            lambda p: truncate(write_npz(p / "t.npz", digits(9, 0))) or p / "t.npz",
            "t.npz cannot be read as npz .*cut short",
        ),
        (lambda p: damage(write_npz(p / "d.npz", digits(9, 0))) or p / "d.npz", "d.npz is damaged .*Bad CRC-32"),
        (lambda p: write_npz(p / "1.npz", digits(1, 0)), "1.npz has 1 images, of which 1 are to be used: at least 2"),
        (
            lambda p: write_npz(p / "s.npz", digits(4, 0, size=32)),
            "samples are 32 x 32, the reference 16 x 16 .*--allow_size",
        ),
    ],
)
def test_samples_that_are_wrong_say_how(config, tmp_path, make, message):
    bad = replace(config, samples=str(make(tmp_path)))
    with pytest.raises(ValueError, match=message):
        run_evaluate(bad)


def test_a_folder_with_an_unreadable_image_names_it(config, tmp_path):
    folder = tmp_path / "png"
    write_folder(folder, digits(6, 0))
    truncate(folder / "class1" / "0004.png")
    with pytest.raises(ValueError, match="0004.png cannot be read as an image .*: remove it or write it again"):
        run_evaluate(replace(config, samples=str(folder)))
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(folder / "class1" / "0004.png")
    with pytest.raises(ValueError, match="0004.png has pixels of more than 8 bits"):
        run_evaluate(replace(config, samples=str(folder)))


def test_a_folder_of_mixed_sizes_names_two_images(config, tmp_path):
    write_folder(tmp_path / "png", digits(6, 0))
    Image.fromarray(digits(1, 0, size=32)[0]).save(tmp_path / "png" / "large.png")
    with pytest.raises(
        ValueError, match=r"images differ in size: .*png is \d+ x \d+, .*png is \d+ x \d+; crop and resize"
    ):
        run_evaluate(replace(config, samples=str(tmp_path / "png")))


def test_sizes_may_differ_when_that_is_asked_for(config, tmp_path):
    larger = replace(config, samples=write_npz(tmp_path / "large.npz", digits(80, 1, size=32)))
    metrics = run_evaluate(replace(larger, allow_size_mismatch=True))["metrics"]
    assert metrics == pytest.approx(run_evaluate(config)["metrics"], rel=1e-5)


def test_missing_inception_weights_are_named(config, tmp_path):
    missing = replace(config, features="inception", weights=str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match=f"no Inception weights at .*none.pth.* need {WEIGHTS_NAME} from https://"):
        run_evaluate(missing)


def test_missing_dinov2_weights_are_named(config, tmp_path):
    missing = replace(config, features="dinov2", weights=str(tmp_path / "none"))
    remedy = "give the folder of a downloaded copy: --weights FOLDER .`hf download facebook/dinov2-large"
    with pytest.raises(ValueError, match=f"cannot load DINOv2 from .*none: .*{remedy}"):
        run_evaluate(missing)


def test_statistics_of_other_features_are_refused(config, tmp_path):
    path = tmp_path / "statistics.npz"
    Evaluator(replace(config, save_statistics=str(path)))
    assert load_statistics(path).kind == "digits"
    with pytest.raises(
        ValueError, match="statistics of digits features, but --features is inception: choose --features digits"
    ):
        run_evaluate(replace(config, reference=str(path), features="inception"))
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="mu has 2048 values, but digits features are 64"):
        run_evaluate(replace(config, reference=str(path)))


def test_metrics_asked_for_by_name_must_be_possible(config):
    with pytest.raises(ValueError, match="sfid cannot be computed: digits features have no spatial part"):
        run_evaluate(replace(config, metrics=("sfid",)))
    with pytest.raises(
        ValueError, match="kid cannot be computed: it needs 1000 images on both sides; the smaller has 80"
    ):
        run_evaluate(replace(config, metrics=("kid",), kid_subset_size=1000))
    report = run_evaluate(replace(config, kid_subset_size=1000))  # not asked for: left out, with the reason
    assert report["skipped"]["kid"] == "it needs 1000 images on both sides; the smaller has 80"


def test_features_that_are_not_finite_stop_the_evaluation(config, monkeypatch):
    evaluator = Evaluator(config)
    good = evaluator.extractor.extract
    monkeypatch.setattr(evaluator.extractor, "extract", lambda images: Features(good(images).pool.log()))  # log 0
    with pytest.raises(ValueError, match="features of image 2 are NaN or infinite"):
        evaluator.update(torch.from_numpy(np.concatenate([digits(2, 1).clip(1), np.zeros((1, 16, 16, 3), np.uint8)])))


@pytest.mark.parametrize("images", [torch.rand(2, 3, 16, 16), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)])
def test_updates_take_only_uint8_channels_last(config, images):
    with pytest.raises(
        ValueError, match=r"images must be uint8 of shape \(B, H, W, 3\); got .*Decoded images in \[-1, 1\]"
    ):
        Evaluator(config).update(images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": "clip"}, "features 'clip' is unknown; choose inception, dinov2 or digits"),
        ({"metrics": ("fid", "lpips")}, r"metrics\[1\] 'lpips' is unknown; choose fid, sfid"),
        ({"batch_size": 0}, "batch_size 0 must be at least 1"),
        ({"distance_precision": "bfloat16"}, "'bfloat16' is unknown; choose auto, float16 or float32"),
    ],
)
def test_options_are_checked_at_once(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


def test_digits_features_take_no_weights_and_no_tiny_images(config):
    with pytest.raises(ValueError, match="digits features are pixels and take no weights"):
        Evaluator(replace(config, weights="x.pth"))
    with pytest.raises(ValueError, match="need images of at least 8 x 8 pixels; got 4 x 4"):
        build_extractor("digits")(torch.zeros(2, 4, 4, 3, dtype=torch.uint8))


def test_reading_ahead_keeps_order_and_raises_the_readers_error_in_its_place():
    def batches():
        yield from range(10)
        raise ValueError("image 10 is damaged")

    seen = []
    with pytest.raises(ValueError, match="image 10 is damaged"):
        for batch in read_ahead(batches(), depth=2):
            seen.append(batch)
    assert seen == list(range(10))
    ahead = read_ahead(iter(range(1000)), depth=2)
    assert next(ahead) == 0
    ahead.close()  # the reader's thread ends although nobody takes the rest


def test_a_folder_of_sfd_sample_is_its_npz_or_its_images(tmp_path):
    """The grid beside them is no sample; what is hidden is no image, at any depth."""
    images = digits(6, 1)
    out = tmp_path / "samples"
    (out / "images" / ".ipynb_checkpoints").mkdir(parents=True)
    (out / "run.json").write_text("{}")
    for i, image in enumerate(images):
        Image.fromarray(image).save(out / "images" / f"{i:06d}.png")
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(out / "grid.png")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(out / "images" / "._000000.png")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(out / "images" / ".ipynb_checkpoints" / "a.png")
    found = open_images(out)
    assert (found.num_images, found.path) == (6, out / "images")
    assert sorted(path.name for path in found.paths) == [f"{i:06d}.png" for i in range(6)]
    np.savez(out / "samples.npz", arr_0=images)
    assert open_images(out).path == out / "samples.npz"
