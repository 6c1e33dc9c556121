"""LightningDiT: equality with the released network, layouts, precision, recomputation, bad input."""

import copy
import json
from dataclasses import replace

import pytest
import sfd_kernels
import torch
from harness.support import GOLDEN, load_golden, load_golden_config
from torch.utils.flop_counter import FlopCounterMode

from sfd_fast.config import ModelConfig
from sfd_fast.config.presets import PRESETS, XL, XXL, B, L, S
from sfd_fast.formats.released_model import load_released
from sfd_fast.models.dit import AdaLN, Block, LightningDiT, ModulatedNorm, num_flops

MODELS = ["sfd", "sync", "noshift", "patch2"]
TINY = ModelConfig(
    hidden_size=32, depth=3, num_heads=2, grid_size=4, texture_channels=3, semantic_channels=2, num_classes=10,
    repa_channels=8, repa_depth=2, repa_hidden=16,
)  # fmt: skip


def golden_case(name):
    """(model, tensors of NAME.golden, clocks of the training tensors)."""
    tensors, config = load_golden(f"{name}.golden"), load_golden_config(name)
    model = load_released(GOLDEN / f"{name}.weights.safetensors", config)
    tau = tensors["t"] * (1 + config["semfirst_delta_t"])
    return model, tensors, (tau - config["semfirst_delta_t"]).clamp(min=0), tau.clamp(max=1)


def random_model(config=TINY, seed=0, **runtime):
    """A network in which every parameter acts (fresh ones are zero at the end)."""
    torch.manual_seed(seed)
    model = LightningDiT(config, **runtime)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def batch(config=TINY, size=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, config.channels, config.grid_size, config.grid_size, generator=generator)
    clocks = torch.linspace(0.1, 0.6, size), torch.linspace(0.4, 0.9, size)
    return x, *clocks, torch.arange(size) % config.num_classes


def gradients(model, *, autocast=False, call=None):
    """(velocity, features, {name: gradient}) of a loss that all parameters reach."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        velocity, features = (model if call is None else call)(*batch(model.config), return_features=True)
    (velocity.float().square().sum() + features.float().square().sum()).backward()
    return velocity, features, {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(params=["operators", "references"])
def implementation(request):
    """The fused operators of this device, and plain PyTorch."""
    if request.param == "operators":
        yield
    else:
        with sfd_kernels.reference_only():
            yield


@pytest.mark.golden
@pytest.mark.parametrize("name", MODELS)
def test_forward_equals_the_released_network(name, implementation):
    model, tensors, _, _ = golden_case(name)
    t_tex, t_sem = tensors.get("t_tex", tensors["t"]), tensors.get("t_sem", tensors["t"])
    velocity = model(tensors["x"], t_tex, t_sem, tensors["y"])
    torch.testing.assert_close(velocity, tensors["forward"], rtol=1e-4, atol=1e-5)


@pytest.mark.golden
@pytest.mark.parametrize("name", MODELS)
def test_training_output_losses_and_all_gradients_equal_the_released_ones(name, implementation):
    model, tensors, t_tex, t_sem = golden_case(name)
    model.train()
    x0, x1 = tensors["train.x0"], tensors["train.x1"]
    count = model.config.texture_channels
    x = sfd_kernels.noise_latents(x1, x0, t_tex, t_sem, count)
    prediction, features = model(x, t_tex, t_sem, tensors["y"], return_features=True)
    velocity, cosine = sfd_kernels.flow_matching_loss(prediction, x0, x1, count, 2.0)
    target = tensors["train.vfm_features"].flatten(2).transpose(1, 2)
    mse, repa = sfd_kernels.feature_alignment_loss(features, target)
    total = velocity.mean() + cosine.mean() + repa.mean()
    total.backward()
    for value, key in (
        (prediction, "pred"), (velocity, "velocity_loss"), (cosine, "cosine_loss"), (repa, "repa_loss"),
        (0.5 * mse, "repa_loss_mse_lambda0.5"), (0.25 * (repa + mse), "repa_loss_cos_mse_lambda0.5"), (total, "total"),
    ):  # fmt: skip
        torch.testing.assert_close(
            value, tensors[f"train.{key}"], rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {key.removeprefix("grad.") for key in tensors if key.startswith("grad.")}
    for key, gradient in trained.items():
        torch.testing.assert_close(
            gradient, tensors[f"grad.{key}"], rtol=1e-3, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.golden
@pytest.mark.parametrize("released, preset", [("XL/1", XL), ("1p0B/1", XXL), ("B/1", B)])
def test_layout_equals_the_released_state_dict_in_keys_shapes_and_order(released, preset):
    layouts = json.loads((GOLDEN / "official_state_dict_layouts.json").read_text())
    with torch.device("meta"):
        model = LightningDiT(preset)
    layout = [[key, list(value.shape)] for key, value in model.state_dict().items()]
    assert layout == [[key, shape] for key, shape in layouts[f"LightningDiT-{released}"].items()]


@pytest.mark.parametrize("preset, millions", [(B, 137.6), (XL, 682.8), (XXL, 1037.2)])
def test_parameter_counts_are_the_published_ones(preset, millions):
    with torch.device("meta"):
        model = LightningDiT(preset)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name):
    config = PRESETS[name]
    with torch.device("meta"):
        model = LightningDiT(config)
    assert len(model.blocks) == config.depth
    assert model.blocks[0].mlp.w12.out_features == 2 * int(8 / 3 * config.hidden_size)


@pytest.mark.parametrize(
    "preset, forward, training", [(XL, 237.3e9, 724e9), (XXL, 358.3e9, 1089e9), (B, 46.0e9, 149e9)]
)
def test_flops_of_released_sizes(preset, forward, training):
    assert num_flops(preset) == pytest.approx(forward, rel=2e-3)
    assert num_flops(preset, training=True) == pytest.approx(training, rel=3e-3)


@pytest.mark.parametrize("config", [TINY, S, L], ids=["tiny", "S", "L"])
def test_flops_equal_what_torch_counts(config):
    with torch.device("meta"):
        model = LightningDiT(config)
        x, t = torch.empty(1, config.channels, config.grid_size, config.grid_size), torch.empty(1)
        labels = torch.empty(1, dtype=torch.int64)
    with sfd_kernels.reference_only(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x, t, t, labels)
    attention = config.depth * 4 * config.num_tokens**2 * config.hidden_size
    counted = counter.get_total_flops()
    if not any("attention" in str(op) or "bmm" in str(op) for op in counter.get_flop_counts()["Global"]):
        counted += attention  # the meta device's fused attention has no formula in torch
    assert num_flops(model.config) == counted


def test_a_fresh_network_predicts_zero_and_its_blocks_change_nothing():
    model = LightningDiT(TINY)
    assert not model(*batch()).any()
    for module in model.modules():
        if isinstance(module, AdaLN):
            assert not module[1].weight.any() and not module[1].bias.any()


def test_initial_weights_have_the_spread_of_the_method():
    torch.manual_seed(0)
    model = LightningDiT(ModelConfig(depth=2, hidden_size=256, num_heads=4, grid_size=4, num_classes=400))
    for weight in (model.blocks[0].attn.qkv.weight, model.blocks[0].mlp.w12.weight, model.repa_projector[0].weight):
        bound = (6 / sum(weight.shape)) ** 0.5  # xavier-uniform on the packed matrix
        assert weight.abs().max() <= bound and weight.abs().max() > 0.99 * bound
    patch = model.x_embedder.proj.weight
    assert patch.abs().max() <= (6 / (256 + patch[0].numel())) ** 0.5
    for weight in (model.y_embedder.embedding_table.weight, model.t_embedder_sem.mlp[0].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.pos_embed.requires_grad


def test_each_clock_reaches_the_velocity_through_its_own_embedder():
    model = random_model()
    x, t_tex, t_sem, labels = batch()
    base = model(x, t_tex, t_sem, labels)
    assert not torch.allclose(model(x, t_tex + 0.1, t_sem, labels), base)
    assert not torch.allclose(model(x, t_tex, t_sem + 0.1, labels), base)
    assert not torch.allclose(model(x, t_sem, t_tex, labels), base)


def test_one_clock_reads_the_texture_time_only():
    model = random_model(ModelConfig(**{**vars(TINY), "two_clocks": False}))
    x, t_tex, t_sem, labels = batch()
    assert torch.equal(model(x, t_tex, t_sem, labels), model(x, t_tex, t_sem + 0.1, labels))
    assert not torch.allclose(model(x, t_tex + 0.1, t_sem, labels), model(x, t_tex, t_sem, labels))


def test_a_condition_computed_beforehand_gives_the_same_velocity():
    model = random_model()
    x, t_tex, t_sem, labels = batch()
    condition = model.condition(t_tex, t_sem, labels)
    assert torch.equal(model(x, None, None, None, condition=condition), model(x, t_tex, t_sem, labels))


def test_the_repa_head_runs_only_when_features_are_asked_for():
    model = random_model()
    calls = []
    model.repa_projector.register_forward_hook(lambda *_: calls.append(1))
    velocity = model(*batch())
    assert not calls
    same, features = model(*batch(), return_features=True)
    assert calls == [1]
    assert features.shape == (2, 16, 8)
    assert torch.equal(same, velocity)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_repa_head_reads_the_completed_output_of_its_block(depth):
    model = random_model(ModelConfig(**{**vars(TINY), "repa_depth": depth}))
    _, features = model(*batch(), return_features=True)
    x, t_tex, t_sem, labels = batch()
    c = model.condition(t_tex, t_sem, labels)
    stream, branch, gate = model.x_embedder(x) + model.pos_embed, None, None
    for block in model.blocks[:depth]:
        _, stream, branch, gate = block(stream, branch, gate, c, *model.feat_rope())
    expected = model.repa_projector(stream + gate[:, None] * branch)
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("share, count", [(0.0, 0), (0.34, 1), (0.67, 2), (1.0, 3)])
def test_recomputing_a_share_of_the_blocks_leaves_every_bit_of_the_gradients(share, count):
    model = random_model()
    velocity, _, expected = gradients(model)
    model.checkpoint_activations = share
    runs = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    again, _, found = gradients(model)
    assert len(runs) == len(model.blocks) + count
    assert torch.equal(again, velocity)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_autocast_keeps_the_residual_stream_and_the_clock_features_in_fp32():
    model = random_model()
    seen = {"stream": set(), "branch": set(), "clock": set()}

    def watch_norm(module, inputs):
        seen["stream"].add(inputs[0].dtype)
        seen["branch"].add(inputs[1].dtype if inputs[1] is not None else torch.bfloat16)

    for module in model.modules():
        if isinstance(module, ModulatedNorm):
            module.register_forward_pre_hook(watch_norm)
    model.t_embedder_tex.mlp[0].register_forward_pre_hook(lambda _, inputs: seen["clock"].add(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(*batch())
    assert velocity.dtype == torch.bfloat16
    assert seen == {"stream": {torch.float32}, "branch": {torch.bfloat16}, "clock": {torch.float32}}


@pytest.mark.parametrize("residual, tolerance", [("fp32", 0.03), ("bf16", 0.04)])
def test_bf16_stays_within_a_stated_distance_of_fp32(residual, tolerance):
    velocity, features, expected = gradients(random_model())
    model = random_model(residual=residual)
    dtypes = set()
    model.final_layer.norm_final.register_forward_pre_hook(lambda _, inputs: dtypes.add(inputs[0].dtype))
    low, low_features, found = gradients(model, autocast=True)
    assert dtypes == {torch.float32 if residual == "fp32" else torch.bfloat16}
    assert (low - velocity).norm() < tolerance * velocity.norm()
    assert (low_features - features).norm() < tolerance * features.norm()
    flat, low_flat = (torch.cat([g[name].flatten() for name in expected]) for g in (expected, found))
    assert (low_flat - flat).norm() < tolerance * flat.norm()


def test_weights_may_be_cast_to_bf16_for_sampling():
    model = random_model().eval()
    low = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        velocity, expected = low(*batch()), model(*batch())
    assert velocity.dtype == torch.bfloat16
    assert (velocity - expected).norm() < 0.03 * expected.norm()


def test_a_double_network_computes_in_double():
    model = random_model().double()
    x, t_tex, t_sem, labels = batch()
    velocity = model(x.double(), t_tex.double(), t_sem.double(), labels)
    assert velocity.dtype == torch.float64
    torch.testing.assert_close(velocity.float(), random_model()(x, t_tex, t_sem, labels), rtol=1e-4, atol=1e-4)


def test_velocity_does_not_depend_on_the_company_in_the_batch():
    model = random_model().eval()
    x, t_tex, t_sem, labels = batch(size=4)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        velocity, shuffled = model(x, t_tex, t_sem, labels), model(x[order], t_tex[order], t_sem[order], labels[order])
    assert torch.equal(shuffled, velocity[order])


def test_the_whole_network_compiles_as_one_graph():
    model = random_model()
    velocity, features, expected = gradients(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    again, _, found = gradients(model, call=compiled)
    torch.testing.assert_close(again, velocity)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_block_uses_no_parameters_of_other_modules():
    """ZeRO 3 gathers a module's parameters before its forward: a block alone must do with its own."""
    block = Block(TINY)
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    entered, stream, branch, gate = block(x, None, None, c, None, None)
    (stream + gate[:, None] * branch).sum().backward()
    assert torch.equal(entered, x)
    assert all(p.grad is not None for p in block.parameters())


def test_latents_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 5, 8, 8\) were given; this model takes \(B, \(5, 4, 4\)\)"):
        random_model()(torch.randn(2, 5, 8, 8), *batch()[1:])


def test_features_of_a_network_without_repa_head_are_refused():
    model = random_model(ModelConfig(**{**vars(TINY), "repa_channels": 0}))
    with pytest.raises(ValueError, match="repa_channels = 0"):
        model(*batch(), return_features=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"residual": "fp16"}, "residual 'fp16' is unknown; choose fp32 or bf16"),
        ({"checkpoint_activations": 1.5}, "share of the blocks, 0 to 1"),
    ],
)
def test_unknown_runtime_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LightningDiT(TINY, **options)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16])
def test_labels_may_be_of_every_integer_type(dtype):
    model, inputs = random_model(), batch()
    expected = model(*inputs[:3], torch.tensor([3, 1]))
    assert torch.equal(model(*inputs[:3], torch.tensor([3, 1]).to(dtype)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_labels_that_are_no_integers_are_refused(dtype):
    with pytest.raises(ValueError, match=f"labels are {dtype}; they must be whole numbers"):
        random_model()(*batch()[:3], torch.ones(2, dtype=dtype))


def test_without_label_dropout_there_is_no_row_for_the_null_class():
    """docs/METHOD.md 3"""
    for dropout, rows in ((0.1, TINY.num_classes + 1), (0.0, TINY.num_classes)):
        with torch.device("meta"):
            model = LightningDiT(replace(TINY, class_dropout=dropout))
        assert model.y_embedder.embedding_table.weight.shape[0] == rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_builds_the_same_bits(dtype):
    torch.manual_seed(0)
    expected = LightningDiT(TINY).state_dict()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        built = LightningDiT(TINY).state_dict()
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(built[k], v) and built[k].dtype == v.dtype for k, v in expected.items())
