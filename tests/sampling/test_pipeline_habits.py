"""What users of diffusers expect of a pipeline: names, forms of results, callbacks, moves, parts."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from harness.tiny_pipelines import TINY, build, drawn, random_model
from PIL import Image

import sfd_fast
from sfd_fast.config import GuidanceConfig, SamplerConfig, SFDConfig
from sfd_fast.formats.model_folder import save_model
from sfd_fast.sampling.pipeline import SFDPipeline

LABELS = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def pipeline():
    return build()


def latents(pipeline, *arguments, **options):
    return pipeline(*arguments, output_type="latent", **options).images


def test_the_pipeline_is_a_name_of_the_package():
    assert sfd_fast.SFDPipeline is SFDPipeline


def test_the_output_is_read_by_name_by_number_and_as_a_tuple(pipeline):
    output = pipeline(LABELS[:2])
    assert output[0] is output.images is output["images"] is output.to_tuple()[0]
    assert output[:2] == (output.images, output.class_labels)
    (images,) = pipeline(LABELS[:2], return_dict=False)
    assert [np.asarray(image).tobytes() for image in images] == [np.asarray(image).tobytes() for image in output[0]]


def test_every_output_type_is_the_same_picture(pipeline):
    """np and pt are floats in [0, 1], pil their rounding to 255, latent what decode takes."""
    shown = drawn(pipeline, LABELS)
    floats = pipeline(LABELS, output_type="np").images
    assert floats.dtype == np.float32 and floats.shape == (5, 8, 8, 3)
    assert 0 <= floats.min() < floats.max() <= 1
    assert np.abs(floats * 255 - shown).max() <= 0.5 + 1e-3
    tensors = pipeline(LABELS, output_type="pt").images
    assert torch.equal(tensors.permute(0, 2, 3, 1), torch.from_numpy(floats))
    final = latents(pipeline, LABELS)
    assert final.shape == (5, 6, 4, 4) and final.dtype == torch.float32
    assert np.array_equal(np.stack(pipeline.decode(final)), shown)
    assert np.array_equal(pipeline.decode(final, output_type="np"), floats)
    assert torch.equal(pipeline.decode(final, output_type="pt"), tensors)


@pytest.mark.parametrize(
    "output_type, shape", [("np", (0, 8, 8, 3)), ("pt", (0, 3, 8, 8)), ("latent", (0, 6, 4, 4)), ("pil", (0,))]
)
def test_no_classes_are_no_images_of_every_type(pipeline, output_type, shape):
    images = pipeline([], output_type=output_type).images
    assert np.shape(images) == shape


def test_the_codecs_range_is_cut_to_0_and_1():
    pipe = build()
    pipe.statistics.texture_std.mul_(20)
    floats = pipe(LABELS, output_type="np").images
    assert floats.min() == 0 and floats.max() == 1


def test_several_images_of_a_class_have_ids_of_their_own(pipeline):
    output = pipeline([3, 7], num_images_per_prompt=3, output_type="np")
    assert output.class_labels.tolist() == [3, 3, 3, 7, 7, 7]
    assert output.sample_ids.tolist() == [0, 1, 2, 3, 4, 5]
    same = pipeline([3, 3, 3, 7, 7, 7], output_type="np")
    assert np.array_equal(output.images, same.images)
    with pytest.raises(ValueError, match="6 images but 2 sample_ids: give one id per image"):
        pipeline([3, 7], num_images_per_prompt=3, sample_ids=[0, 1])
    with pytest.raises(ValueError, match="num_images_per_prompt 0 must be at least 1"):
        pipeline([3], num_images_per_prompt=0)


def test_noise_of_ones_own_takes_the_place_of_seed_and_ids(pipeline):
    noise = pipeline.initial_noise(torch.tensor([5, 9]), 3)
    by_noise = latents(pipeline, [1, 2], latents=noise)
    assert torch.equal(by_noise, latents(pipeline, [1, 2], sample_ids=[5, 9], seed=3))
    assert not torch.equal(by_noise, latents(pipeline, [1, 2]))
    assert torch.equal(latents(pipeline, [1, 2], latents=noise.double()), by_noise)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"latents": torch.zeros(1, 6, 4, 4)}, r"of shape \(2, 6, 4, 4\) .* not \(1, 6, 4, 4\)"),
        ({"latents": torch.zeros(2, 6, 4, 4, dtype=torch.int64)}, r"standard normals of shape \(2, 6, 4, 4\)"),
        ({"latents": np.zeros((2, 6, 4, 4))}, "not ndarray"),
        ({"latents": torch.full((2, 6, 4, 4), float("nan"))}, "latents hold NaN or infinity"),
        ({"latents": torch.zeros(2, 6, 4, 4), "sample_ids": [0, 1]}, "give one of the two"),
        ({"generator": torch.Generator()}, "noise is a function of seed and sample_ids.*give seed=.*sample_ids="),
        ({"generator": [torch.Generator()]}, "generator is not taken"),
        ({"output_type": "uint8"}, "output_type 'uint8' is unknown; choose pil, np, pt or latent"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "this pipeline has latents, class_labels, sample"),
        ({"callback_on_step_end": lambda *step: 7}, "must return a dictionary of tensors or None, not int"),
        ({"callback_on_step_end": lambda *step: {"latents": torch.zeros(1)}}, r"returned latents of shape \(1,\)"),
    ],
)
def test_what_a_call_does_not_take_is_refused_in_a_sentence(pipeline, given, message):
    with pytest.raises(ValueError, match=message):
        pipeline([1, 2], **given)


@pytest.mark.parametrize(
    "sampler, taus",
    [
        (SamplerConfig(solver="euler", num_inference_steps=4), None),
        (SamplerConfig(solver="heun", num_inference_steps=5), None),
        (SamplerConfig(solver="abm3", num_inference_steps=6), None),
        (SamplerConfig(solver="dopri5", rtol=0.05), [0.3, 1.0, 1.3]),
        (SamplerConfig(solver="dopri5", rtol=0.05, grid="released"), [1.3]),
    ],
    ids=str,
)
def test_a_callback_sees_every_step_and_the_last_latents_are_the_result(pipeline, sampler, taus):
    seen = []

    def after(given, step, tau, tensors):
        assert given is pipeline
        assert set(tensors) == {"latents", "class_labels", "sample_ids"}
        seen.append((step, tau, tensors["latents"], tensors["sample_ids"].tolist()))

    final = latents(
        pipeline, [1, 2], sampler=sampler, callback_on_step_end=after,
        callback_on_step_end_tensor_inputs=["latents", "class_labels", "sample_ids"],
    )  # fmt: skip
    assert [step for step, *_ in seen] == list(range(len(seen)))
    assert len(seen) == (len(taus) if taus else sampler.num_inference_steps)
    found = [tau for _, tau, *_ in seen]
    assert found == (pytest.approx(taus) if taus else sorted(found)) and found[-1] == pytest.approx(1.3)
    assert torch.equal(seen[-1][2], final) and seen[0][3] == [0, 1]
    assert torch.equal(final, latents(pipeline, [1, 2], sampler=sampler))


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4", "ab2", "abm3", "dopri5"])
def test_latents_that_a_callback_returns_go_on(solver):
    """A trajectory continued from another one's state: for one-step methods the result is the other's, to the bit."""
    pipe = build(sampler=SamplerConfig(solver=solver, num_inference_steps=5, rtol=0.05), guidance=GuidanceConfig())
    states = []
    pipe([7], seed=9, callback_on_step_end=lambda _, step, tau, tensors: states.append(tensors["latents"]))

    def swap(_, step, tau, tensors):
        return {"latents": states[1]} if step == 1 else None

    def shift(_, step, tau, tensors):
        return {"latents": tensors["latents"] + 1} if step == 1 else tensors

    changed = latents(pipe, [7], callback_on_step_end=swap)
    if solver not in ("ab2", "abm3"):  # which keep earlier velocities
        assert torch.equal(changed, states[-1])
    assert not torch.equal(changed, latents(pipe, [7]))
    assert not torch.equal(latents(pipe, [7], callback_on_step_end=shift), latents(pipe, [7]))


def test_a_callback_changes_its_own_micro_batch_alone(pipeline):
    """Five images in micro-batches of four: the second is told its one image, and the first stays as it was."""

    def shift_second(_, step, tau, tensors):
        return {"latents": tensors["latents"] * 2} if len(tensors["latents"]) == 1 else None

    plain, changed = latents(pipeline, LABELS), latents(pipeline, LABELS, callback_on_step_end=shift_second)
    assert torch.equal(plain[:4], changed[:4])
    assert not torch.equal(plain[4], changed[4])


def test_the_bar_moves_with_the_steps(pipeline, capsys):
    pipe = build()
    pipe.set_progress_bar_config(desc="drawing", mininterval=0, ncols=60)
    moved = []
    bar = pipe.progress_bar(total=9)
    assert bar.total == 9 and bar.desc.startswith("drawing")
    bar.close()
    pipe(LABELS, callback_on_step_end=lambda _, step, tau, tensors: moved.append(capsys.readouterr().err))
    assert all(f"{done}/8" in text for done, text in enumerate(moved, 1))  # two micro-batches of four steps
    pipe.set_progress_bar_config(disable=True)
    capsys.readouterr()
    pipe(LABELS)
    assert capsys.readouterr().err == ""
    assert list(pipe.progress_bar([1, 2])) == [1, 2]


def test_components_make_the_same_pipeline_with_the_same_weights():
    pipe = build(id2label=["cat"])
    components = pipe.components
    assert {"transformer", "guide", "texture_codec", "statistics"} <= components.keys()
    again = SFDPipeline(**components, micro_batch_size=4, device="cpu")
    assert np.array_equal(drawn(again, LABELS), drawn(pipe, LABELS))
    assert again.id2label == {0: "cat"}
    ours, theirs = (p.transformer.final_layer.linear.weight for p in (pipe, again))
    assert ours.data_ptr() == theirs.data_ptr()


@pytest.mark.parametrize(
    "target", [(torch.bfloat16,), ("cpu", torch.bfloat16), (torch.device("cpu"), torch.bfloat16)], ids=str
)
def test_to_changes_the_networks_dtype_in_place(pipeline, target):
    network = random_model(TINY, 0)
    pipe = build()
    drawn(pipe, LABELS)
    assert pipe.to(*target) is pipe
    assert (pipe.dtype, pipe.precision, pipe.device) == (torch.bfloat16, "bf16", torch.device("cpu"))
    assert pipe.transformer.pos_embed.dtype == pipe.guide.pos_embed.dtype == torch.bfloat16
    assert torch.equal(latents(pipe, LABELS), latents(build(torch_dtype=torch.bfloat16), LABELS))
    assert not torch.equal(latents(pipe, LABELS), latents(pipeline, LABELS))
    assert network.pos_embed.dtype == torch.float32


def test_to_leaves_the_callers_network_and_the_other_pipelines_as_they_are(pipeline):
    before = drawn(pipeline, LABELS)
    SFDPipeline(**pipeline.components, device="cpu").to(torch.bfloat16)
    assert pipeline.transformer.pos_embed.dtype == torch.float32
    assert np.array_equal(drawn(pipeline, LABELS), before)


def test_to_with_keywords_and_with_nothing():
    pipe = build()
    assert pipe.to(device="cpu").to(dtype=torch.float32).to().dtype == torch.float32
    assert torch.equal(latents(pipe, [1]), latents(build(), [1]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.float16,), "torch_dtype torch.float16 is unknown; choose torch.float32 or torch.bfloat16"),
        (("cpu", "cpu"), "two devices were given"),
        ((torch.float32, torch.float32), "two dtypes were given"),
    ],
)
def test_to_refuses_what_it_cannot_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        build().to(*arguments)


def test_weights_that_were_rounded_are_not_saved(tmp_path):
    for pipe in (build(torch_dtype=torch.bfloat16), build().to(torch.bfloat16).to(torch.float32)):
        with pytest.raises(ValueError, match="lost bits of its weights: load it with torch_dtype=torch.float32"):
            pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


class Moves:
    """Where a part was sent, in order."""

    def __init__(self, pipeline):
        self.sent = []
        for name in ("transformer", "guide", "texture_codec"):
            module = getattr(pipeline, name)
            module.to = lambda place, *rest, name=name: self.sent.append((name, str(place)))

    def take(self):
        taken, self.sent[:] = list(self.sent), []
        return taken


def test_parts_that_are_offloaded_are_on_the_device_only_while_used():
    """Nine images in three micro-batches: all latents, then all decoding, then everything away. `cpu:0` is the device
    here, as there is no other; parts wait on `cpu`."""
    pipe = build()
    expected = drawn(pipe, [*LABELS, *LABELS[:4]])
    moves = Moves(pipe)
    pipe.enable_model_cpu_offload(device="cpu:0")
    away = [("transformer", "cpu"), ("guide", "cpu"), ("texture_codec", "cpu")]
    assert moves.take() == away
    assert np.array_equal(drawn(pipe, [*LABELS, *LABELS[:4]]), expected)
    networks = [("texture_codec", "cpu"), ("transformer", "cpu:0"), ("guide", "cpu:0")]
    codec = [("transformer", "cpu"), ("guide", "cpu"), ("texture_codec", "cpu:0")]
    assert moves.take() == networks + 3 * codec + away
    pipe.trajectory(LABELS[:2], num_frames=2)
    assert moves.take()[:3] == networks and moves.take() == []
    with pytest.raises(ValueError, match="move by themselves since enable_model_cpu_offload"):
        pipe.to("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_offloading_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="needs a GPU, and there is none"):
        build().enable_model_cpu_offload()


def test_another_offset_is_sampled_with_a_warning(tmp_path, caplog):
    save_model(tmp_path / "run", random_model(TINY, 0), config=SFDConfig(model=TINY), statistics=build().statistics)
    options = {"texture_codec": build().texture_codec, "device": "cpu"}
    with caplog.at_level(logging.WARNING):
        usual = SFDPipeline.from_pretrained(tmp_path / "run", **options)
        assert not caplog.records
        other = SFDPipeline.from_pretrained(tmp_path / "run", delta_t=0.1, **options)
    (record,) = caplog.records
    assert "sampling with delta_t 0.1: the model was trained with 0.3" in record.getMessage()
    assert (usual.delta_t, other.delta_t) == (0.3, 0.1)
    steps = {"num_inference_steps": 6}
    assert not torch.equal(latents(usual, [1], **steps), latents(other, [1], **steps))
    other.save_pretrained(tmp_path / "saved")
    with caplog.at_level(logging.WARNING):
        assert SFDPipeline.from_pretrained(tmp_path / "saved", device="cpu").delta_t == 0.1
    assert len(caplog.records) == 2


def test_pictures_are_pil_images(pipeline):
    assert all(isinstance(image, Image.Image) for image in pipeline(replace(TINY).num_classes - 1).images)
