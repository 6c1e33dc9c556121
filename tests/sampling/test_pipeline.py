"""SFDPipeline: bit-equal images, folders, and bad input."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from harness.tiny_pipelines import STATISTICS, TINY, build, drawn, random_model
from PIL import Image

from sfd_fast.config import DataConfig, GuidanceConfig, SamplerConfig, SFDConfig
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.models.dit import LightningDiT
from sfd_fast.models.texture import IdentityCodec
from sfd_fast.sampling.pipeline import SFDPipeline


@pytest.fixture(scope="module")
def pipeline():
    return build()


LABELS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5])


def test_returns_one_pil_image_per_label(pipeline):
    output = pipeline(LABELS[:3], num_inference_steps=3)
    assert [type(image) for image in output.images] == [Image.Image] * 3
    assert output.images[0].size == (8, 8)
    assert output.sample_ids.tolist() == [0, 1, 2]
    assert len(pipeline(7).images) == 1
    assert len(pipeline([]).images) == 0


def test_images_do_not_depend_on_order_number_or_company(pipeline):
    together = pipeline(LABELS, output_type="np").images
    assert len({image.tobytes() for image in together}) == len(LABELS)  # the two 1s and two 5s differ: other noise
    order = torch.tensor([8, 2, 5, 0, 3, 1, 7, 4, 6])
    shuffled = pipeline(LABELS[order], sample_ids=order, output_type="np").images
    assert np.array_equal(shuffled, together[order.numpy()])
    for i in (0, 5):
        alone = pipeline([LABELS[i]], sample_ids=[i], output_type="np").images
        assert np.array_equal(alone[0], together[i])


def test_images_depend_on_seed_id_and_label(pipeline):
    first = pipeline([3], output_type="np").images
    for other in (
        pipeline([3], seed=1, output_type="np"),
        pipeline([3], sample_ids=[1], output_type="np"),
        pipeline([4], output_type="np"),
    ):
        assert not np.array_equal(other.images, first)


def test_micro_batch_sizes_differ_by_at_most_one_level(pipeline):
    difference = pipeline.micro_batch_difference(LABELS, sizes=(1, 4))
    assert difference["largest"] <= 1
    assert difference["share"] < 0.01
    assert pipeline.micro_batch_size == 4


def test_decoding_uses_the_statistics_and_the_released_rounding():
    """A network of velocity 0 leaves the noise: pixels follow in closed form."""
    model = LightningDiT(TINY)  # zero-initialised output
    pipe = build(guide=None, guidance=GuidanceConfig())
    pipe.transformer.load_state_dict(model.state_dict())
    image = drawn(pipe, [0])[0].astype(np.int64)
    noise = pipe.initial_noise(torch.tensor([0]), 0)[0, :4]
    texture = noise * STATISTICS.texture_std.view(4, 1, 1) + STATISTICS.texture_mean.view(4, 1, 1)
    pixels = torch.nn.functional.pixel_shuffle(texture, 2)[0]
    expected = (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8).numpy()
    assert np.abs(image[..., 0] - expected.astype(np.int64)).max() <= 1  # rounding of the product
    assert (image[..., 0] == expected).mean() > 0.95


def test_guidance_scale_one_never_runs_the_guide():
    pipe = build()
    pipe.guide.forward = None  # calling it would be a TypeError
    pipe([1], guidance_scale=1.0)
    with pytest.raises(TypeError):
        pipe([1], guidance_scale=1.5)


def test_guidance_scale_means_cfg_where_there_is_no_guide():
    pipe = build(guide=None, guidance=GuidanceConfig())
    sampler, guidance = pipe.resolve(guidance_scale=2.0)
    assert guidance.mode == "cfg"
    assert sampler == pipe.sampler
    assert not np.array_equal(
        pipe([1], guidance_scale=2.0, output_type="np").images, pipe([1], output_type="np").images
    )


def test_repa_head_never_runs():
    pipe = build()
    pipe.transformer.repa_projector.forward = None
    pipe.guide.repa_projector.forward = None
    pipe([1])


def test_saved_pipeline_gives_the_same_bits(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    assert {p.name for p in (tmp_path / "saved").iterdir()} == {
        "pipeline.json", "transformer", "guide", "texture_codec", "statistics", "sfd_fast.json",
    }  # fmt: skip
    loaded = SFDPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    assert loaded.sampler == pipeline.sampler
    assert loaded.guidance == pipeline.guidance
    assert np.array_equal(loaded(LABELS[:2], output_type="np").images, pipeline(LABELS[:2], output_type="np").images)


def test_a_pipeline_is_made_from_what_training_writes(tmp_path):
    from sfd_fast.formats.model_folder import save_model

    config = SFDConfig(model=TINY, sampler=SamplerConfig(num_inference_steps=5))
    save_model(tmp_path / "main", random_model(TINY, 0), config=config, statistics=STATISTICS)
    save_model(tmp_path / "guide", random_model(TINY, 1), statistics=STATISTICS)
    pipe = SFDPipeline.from_pretrained(
        tmp_path / "main", guide=tmp_path / "guide", texture_codec=IdentityCodec(4, 2), device="cpu"
    )
    assert pipe.delta_t == 0.3
    assert pipe.sampler.num_inference_steps == 5
    pipe.save_pretrained(tmp_path / "whole")
    assert SFDPipeline.from_pretrained(tmp_path / "whole", device="cpu").training == config


def test_trajectory_shows_the_borders_and_ends_at_the_image(pipeline):
    frames = pipeline.trajectory(LABELS[:2], num_inference_steps=10, num_frames=5)
    taus = [frame.tau for frame in frames]
    assert {0.0, 0.3, 1.0, 1.3} <= set(taus)
    assert taus == sorted(taus)
    assert np.array_equal(frames[-1].images, drawn(pipeline, LABELS[:2], num_inference_steps=10))
    by_tau = {frame.tau: frame for frame in frames}
    assert np.array_equal(by_tau[0.0].images, by_tau[0.3].images)  # texture waits in stage I
    assert np.array_equal(by_tau[1.0].semantic, by_tau[1.3].semantic)  # semantics are done in stage III


def test_bf16_network_keeps_an_fp32_state():
    pipe = build(torch_dtype=torch.bfloat16)
    assert pipe.transformer.x_embedder.proj.weight.dtype == torch.bfloat16
    x0 = pipe.initial_noise(torch.arange(4), 0)
    latents = pipe.sample_latents(LABELS[:4], x0, *pipe.resolve())
    assert latents.dtype == torch.float32
    assert not torch.equal(latents, latents.bfloat16().float())
    exact = build().sample_latents(LABELS[:4], x0, *pipe.resolve())
    torch.testing.assert_close(latents, exact, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    "guidance", [GuidanceConfig(mode="autoguidance", scale=1.5), GuidanceConfig(mode="cfg", scale=2.0)]
)
@pytest.mark.parametrize("sampler", [SamplerConfig(num_inference_steps=5), SamplerConfig(solver="dopri5", rtol=0.05)])
def test_compiled_images_equal_eager_ones(pipeline, sampler, guidance):
    settings = {"sampler": sampler, "guidance": guidance}
    compiled = drawn(build(backend="compile"), LABELS[:4], **settings).astype(np.int64)
    assert np.abs(compiled - drawn(pipeline, LABELS[:4], **settings)).max() <= 1


def test_dopri5_runs_the_compiled_network_under_backend_compile(monkeypatch):
    compiled = []

    def compile_counted(function, **options):
        def called(*args):
            compiled.append(len(args[0]))
            return function(*args)

        return called

    monkeypatch.setattr(torch, "compile", compile_counted)
    build(backend="compile")([1], sampler=SamplerConfig(solver="dopri5", rtol=0.1), guidance_scale=1.0)
    assert len(compiled) > 6
    assert set(compiled) == {4}


def test_dopri5_says_once_that_it_runs_without_cuda_graphs(caplog):
    pipe = build(sampler=SamplerConfig(solver="dopri5", rtol=0.1))
    pipe([1])
    assert not caplog.records
    pipe.backend = "cuda_graph"  # which no CPU pipeline takes
    pipe([1])
    pipe([2])
    (record,) = caplog.records
    assert "solver dopri5 chooses its steps on the host, so backend cuda_graph does not apply" in record.getMessage()
    assert "use backend compile" in record.getMessage()


def test_a_call_takes_every_solver_setting(pipeline):
    given = SamplerConfig(solver="dopri5", grid="released", atol=1e-5, rtol=1e-2)
    assert pipeline.resolve(sampler=given)[0] == given
    assert pipeline.resolve(num_inference_steps=7, sampler=given)[0] == replace(given, num_inference_steps=7)
    with pytest.raises(ValueError, match="num_inference_steps 2 is too small"):
        pipeline([1], sampler=SamplerConfig(num_inference_steps=2))
    grids = [SamplerConfig(solver="euler", num_inference_steps=5, grid=grid) for grid in ("exact", "released")]
    images = [drawn(pipeline, LABELS[:2], sampler=sampler) for sampler in grids]
    assert not np.array_equal(*images)
    frames = pipeline.trajectory(LABELS[:2], num_frames=3, sampler=grids[1])
    assert np.array_equal(frames[-1].images, images[1])


def test_settings_of_many_calls_are_not_kept_for_ever():
    pipe = build(micro_batch_size=1)
    pipe._plans.size = 4
    for num_inference_steps in range(3, 11):
        pipe([1], num_inference_steps=num_inference_steps)
    assert len(pipe._plans.kept) == 4
    assert len(pipe.runners.runners.kept) == 1  # heun's tables have room for all of them


@pytest.mark.parametrize("label", [10, -1, 1000])
def test_label_out_of_range_is_an_error(pipeline, label):
    with pytest.raises(ValueError, match=rf"label {label} is out of range: this model has the classes 0 to 9"):
        pipeline([0, label])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_labels": [0.5]}, "class_labels must be one-dimensional integers"),
        ({"class_labels": [[1], [2]]}, "class_labels must be one-dimensional integers"),
        ({"class_labels": [1, 2], "sample_ids": [0]}, "2 images but 1 sample_ids"),
        ({"class_labels": [1], "seed": -1}, r"seed -1 must be in \[0, 2\^63\)"),
        ({"class_labels": [1], "seed": 2**63}, r"must be in \[0, 2\^63\)"),
        ({"class_labels": [1], "solver": "heunn"}, r"solver 'heunn' is unknown; .*did you mean 'heun'\?"),
        ({"class_labels": [1], "num_inference_step": 9}, "'num_inference_step'; did you mean 'num_inference_steps'"),
        ({"class_labels": [1], "num_inference_steps": 2}, "num_inference_steps 2 is too small"),
        ({"class_labels": [1], "num_inference_steps": 0}, r"num_inference_steps 0 must be in \[1, 100000\]"),
        ({"class_labels": [1], "output_type": "jpeg"}, "output_type 'jpeg' is unknown"),
    ],
)
def test_bad_calls_say_what_is_wrong(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_autoguidance_without_a_guide_is_an_error():
    pipe = build(guide=None, guidance=GuidanceConfig())
    with pytest.raises(ValueError, match="needs a guide model"):
        pipe([1], guidance=GuidanceConfig(mode="autoguidance", scale=1.5))


@pytest.mark.parametrize("part", ["transformer", "guide"])
def test_weights_that_are_not_finite_are_an_error(part):
    broken = random_model(TINY, 0)
    broken.blocks[1].attn.qkv.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=rf"the weights of the {part} hold NaN.*'blocks\.1\.attn\.qkv\.weight'"):
        if part == "guide":
            build(guide=broken)
        else:
            SFDPipeline(broken, statistics=STATISTICS, texture_codec=IdentityCodec(4, 2), delta_t=0.3, device="cpu")


def test_a_sample_that_is_not_finite_is_an_error_naming_it():
    pipe = build()
    pipe.transformer.y_embedder.embedding_table.weight.data[7] = float("inf")  # after the check at construction
    with pytest.raises(ValueError, match=r"sample 2 \(label 7\) is not finite"):
        pipe([1, 2, 7])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"delta_t": 0.0}, "delta_t is 0.0 but the model was built with two clocks"),
        ({"statistics": LatentStatistics.identity(4, 3)}, "statistics of 3 semantic channels for a model with 2"),
        ({"texture_codec": IdentityCodec(3, 1)}, "texture codec has 3 latent channels, the model 4"),
        ({"guide": random_model(replace(TINY, num_classes=7), 0)}, "the guide has num_classes = 7, the model 10"),
        ({"micro_batch_size": 0}, "micro_batch_size 0 must be at least 1"),
        ({"torch_dtype": torch.float16}, "torch_dtype torch.float16 is unknown; choose torch.float32 or torch.bf"),
        ({"backend": "tensorrt"}, "backend 'tensorrt' is unknown"),
    ],
)
def test_parts_that_do_not_fit_together_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_statistics_of_another_data_set_are_an_error(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    other = LatentStatistics(STATISTICS.texture_mean + 1e-4, STATISTICS.texture_std, torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="statistics of another data set: .* the model in .* was trained on latents"):
        SFDPipeline.from_pretrained(tmp_path / "saved", statistics=other)
    other.save(tmp_path / "saved" / "statistics")
    with pytest.raises(ValueError, match="latents_stats.pt is damaged: its SHA-256 is another"):
        SFDPipeline.from_pretrained(tmp_path / "saved")


def test_another_latent_multiplier_than_in_training_is_an_error(tmp_path):
    from sfd_fast.formats.model_folder import save_model

    config = SFDConfig(model=TINY, data=DataConfig(latent_multiplier=0.18215))
    save_model(tmp_path / "main", random_model(TINY, 0), config=config)
    parts = {"texture_codec": IdentityCodec(4, 2), "device": "cpu"}
    with pytest.raises(ValueError, match=r"latent multiplier 1\.0 is given, but .* trained on latents times 0\.18215"):
        SFDPipeline.from_pretrained(tmp_path / "main", statistics=STATISTICS, **parts)
    fitting = replace(STATISTICS, multiplier=0.18215)
    assert SFDPipeline.from_pretrained(tmp_path / "main", statistics=fitting, **parts).statistics.multiplier == 0.18215


def test_a_network_trained_for_the_released_grid_samples_on_the_exact_one(tmp_path):
    from sfd_fast.formats.model_folder import save_model

    config = SFDConfig(model=TINY, sampler=SamplerConfig(solver="dopri5", grid="released"))
    save_model(tmp_path / "main", random_model(TINY, 0), config=config, statistics=STATISTICS)
    options = {"texture_codec": IdentityCodec(4, 2), "device": "cpu", "micro_batch_size": 2}
    pipe = SFDPipeline.from_pretrained(tmp_path / "main", **options)
    assert pipe.sampler == SamplerConfig(solver="dopri5", grid="exact")
    together = pipe(LABELS[:4], output_type="np").images
    alone = pipe(LABELS[2:3], sample_ids=[2], output_type="np").images
    assert np.array_equal(alone[0], together[2])


def test_saving_without_a_guide_forgets_an_earlier_one(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    build(guide=None, guidance=GuidanceConfig()).save_pretrained(tmp_path / "saved")
    assert SFDPipeline.from_pretrained(tmp_path / "saved", device="cpu").guide is None


def test_separate_scales_with_one_clock_are_an_error():
    model = random_model(replace(TINY, two_clocks=False), 0)
    pipe = SFDPipeline(model, statistics=STATISTICS, texture_codec=IdentityCodec(4, 2), delta_t=0.0, device="cpu")
    with pytest.raises(ValueError, match="separate guidance scales .* need two clocks"):
        pipe([1], num_inference_steps=2, guidance=GuidanceConfig(mode="cfg", texture_scale=1.3, semantic_scale=1.8))


def test_a_guide_of_another_cache_is_an_error(pipeline, tmp_path):
    from sfd_fast.formats.model_folder import save_model

    pipeline.save_pretrained(tmp_path / "saved")
    other = LatentStatistics(STATISTICS.texture_mean, STATISTICS.texture_std * 2, torch.zeros(2), torch.ones(2))
    save_model(tmp_path / "guide", random_model(TINY, 1), statistics=other)
    with pytest.raises(ValueError, match="statistics of another data set: .* the guide in"):
        SFDPipeline.from_pretrained(tmp_path / "saved", guide=tmp_path / "guide")


def test_missing_and_damaged_folders_are_errors(pipeline, tmp_path):
    with pytest.raises(FileNotFoundError, match="model folder .* does not exist"):
        SFDPipeline.from_pretrained(tmp_path / "nowhere")
    pipeline.save_pretrained(tmp_path / "saved")
    weights = tmp_path / "saved" / "transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated or damaged"):
        SFDPipeline.from_pretrained(tmp_path / "saved")


def test_a_folder_without_codec_is_an_error(tmp_path):
    from sfd_fast.formats.model_folder import save_model

    save_model(tmp_path / "main", random_model(TINY, 0), config=SFDConfig(model=TINY), statistics=STATISTICS)
    with pytest.raises(ValueError, match="names no texture codec"):
        SFDPipeline.from_pretrained(tmp_path / "main")
