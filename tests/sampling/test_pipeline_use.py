"""A pipeline in its users' hands: threads, pickling, inference mode, other default dtypes, and their own networks."""

import pickle
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from harness.tiny_pipelines import STATISTICS, TINY, build, random_model

from sfd_fast.config import GuidanceConfig, SamplerConfig
from sfd_fast.models.texture import IdentityCodec
from sfd_fast.sampling.pipeline import SFDPipeline

LABELS = torch.tensor([3, 1, 4, 1, 5])
ADAPTIVE = SamplerConfig(solver="dopri5", rtol=0.05)


def images(pipeline, **options):
    return pipeline(LABELS, output_type="np", **options).images


@pytest.fixture(scope="module")
def expected():
    return images(build())


def test_threads_on_one_pipeline_draw_what_one_thread_draws():
    """Four threads, five calls each, with settings that change from call to call."""
    pipeline, wrong, failed = build(), [], []
    alone = [images(build(), seed=seed, num_inference_steps=3 + seed) for seed in range(5)]
    start = threading.Barrier(4)

    def work(number):
        try:
            start.wait()
            for i in range(5):
                seed = (i + number) % 5
                if not np.array_equal(images(pipeline, seed=seed, num_inference_steps=3 + seed), alone[seed]):
                    wrong.append((number, seed))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, failed) == ([], [])


def test_comparing_micro_batches_beside_a_call_changes_neither(expected):
    pipeline, found = build(), []
    compared = pipeline.micro_batch_difference(LABELS, sizes=(1, 3))
    thread = threading.Thread(target=lambda: found.append(pipeline.micro_batch_difference(LABELS, sizes=(1, 3))))
    thread.start()
    together = [images(pipeline) for _ in range(3)]
    thread.join()
    assert all(np.array_equal(each, expected) for each in together)
    assert found == [compared]


@pytest.mark.parametrize("called", [False, True])
def test_a_pickled_pipeline_draws_the_same_images(called, expected):
    pipeline = build()
    if called:
        images(pipeline)
    copy = pickle.loads(pickle.dumps(pipeline))
    assert np.array_equal(images(copy), expected)
    assert (copy.sampler, copy.guidance, copy.micro_batch_size) == (pipeline.sampler, pipeline.guidance, 4)


@pytest.mark.parametrize("sampler", [None, ADAPTIVE])
def test_calls_inside_and_outside_inference_mode_draw_the_same(sampler):
    first_inside, first_outside = build(), build()
    with torch.inference_mode():
        inside = images(first_inside, sampler=sampler)
    outside = images(first_outside, sampler=sampler)
    assert np.array_equal(inside, outside)
    assert np.array_equal(images(first_inside, sampler=sampler), inside)
    with torch.inference_mode():
        assert np.array_equal(images(first_outside, sampler=sampler), inside)


def test_a_pipeline_made_in_inference_mode_draws_outside_of_it(expected):
    with torch.inference_mode():
        pipeline = build()
    assert np.array_equal(images(pipeline), expected)


def test_gradients_that_are_wanted_outside_do_not_reach_into_a_call(expected):
    with torch.enable_grad():
        assert np.array_equal(images(build()), expected)


@pytest.mark.parametrize("part", ["transformer", "guide"])
@pytest.mark.parametrize("layer", ["t_embedder_tex", "t_embedder_sem", "y_embedder", "blocks"])
def test_weights_that_change_in_place_change_the_images_as_in_a_fresh_pipeline(part, layer, expected):
    pipeline = build()
    images(pipeline)
    for weight in getattr(getattr(pipeline, part), layer).parameters():
        weight.mul_(2)
    fresh = build()
    getattr(fresh, part).load_state_dict(getattr(pipeline, part).state_dict())
    changed = images(pipeline)
    assert np.array_equal(changed, images(fresh))
    assert not np.array_equal(changed, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_callers_networks_stay_as_they_are(dtype):
    model, guide, codec = random_model(TINY, 0).train(), random_model(replace(TINY, depth=1), 1), IdentityCodec(4, 2)
    codec.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wants_gradient = {name: p.requires_grad for name, p in model.named_parameters()}
    pipeline = SFDPipeline(
        model, guide=guide, statistics=STATISTICS, texture_codec=codec, delta_t=0.3, device="cpu", torch_dtype=dtype,
        guidance=GuidanceConfig(mode="autoguidance", scale=1.5), micro_batch_size=4,
    )  # fmt: skip
    images(pipeline, num_inference_steps=4)
    assert model.training and guide.training and codec.training
    assert not pipeline.transformer.training and not any(p.requires_grad for p in pipeline.transformer.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wants_gradient
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    shared = model.final_layer.linear.weight.data_ptr() == pipeline.transformer.final_layer.linear.weight.data_ptr()
    assert shared == (dtype == torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "sampler", [None, ADAPTIVE, SamplerConfig(solver="euler", num_inference_steps=5, grid="released")], ids=str
)
def test_another_default_dtype_changes_no_image(dtype, sampler, tmp_path):
    build().save_pretrained(tmp_path)
    usual = images(SFDPipeline.from_pretrained(tmp_path, device="cpu"), sampler=sampler)
    made_before = build()
    torch.set_default_dtype(dtype)
    try:
        drawn = [images(made_before, sampler=sampler)]
        drawn.append(images(SFDPipeline.from_pretrained(tmp_path, device="cpu"), sampler=sampler))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(np.array_equal(each, usual) for each in drawn)


@pytest.mark.parametrize(
    "labels",
    [
        np.array([3, 1, 4, 1, 5], np.uint8), np.array([3, 1, 4, 1, 5], np.int16), LABELS.to(torch.uint8),
        LABELS.to(torch.int16), [np.int64(3), np.uint8(1), 4, torch.tensor(1), np.uint64(5)], (3, 1, 4, 1, 5),
    ],
    ids=["array of uint8", "array of int16", "tensor of uint8", "tensor of int16", "mixed", "tuple"],
)  # fmt: skip
def test_labels_ids_and_seeds_of_every_integer_type_mean_the_same(labels, expected):
    for seed in (0, np.int64(0), np.uint8(0), torch.tensor(0)):
        found = build()(labels, seed=seed, sample_ids=np.arange(5, dtype=np.uint16), output_type="np")
        assert np.array_equal(found.images, expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_labels": [True, False]}, "class_labels must be one-dimensional integers of 64 bits, not True"),
        ({"class_labels": np.array([True])}, "class_labels must be one-dimensional integers of 64 bits, not True"),
        ({"class_labels": ["cat"]}, r"'cat' is no number, and this model has no names of classes \(id2label\)"),
        ({"class_labels": [None]}, "class_labels must be one-dimensional integers of 64 bits, not None"),
        ({"class_labels": [2**63]}, "must be one-dimensional integers of 64 bits, not 9223372036854775808"),
        ({"class_labels": [1], "sample_ids": [0.0]}, "sample_ids must be one-dimensional integers of 64 bits, not 0.0"),
        ({"class_labels": [1], "sample_ids": [-3]}, "sample id -3 must not be negative"),
        ({"class_labels": [1], "seed": True}, "seed True must be a whole number"),
        ({"class_labels": [1], "seed": 1.5}, "seed 1.5 must be a whole number"),
        ({"class_labels": [1], "seed": np.int64(-1)}, r"seed -1 must be in \[0, 2\^63\)"),
    ],
)
def test_what_is_no_label_id_or_seed_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        build()(**arguments)
