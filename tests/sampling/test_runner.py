"""Sampler steps over static tensors: equal to the plain sampler, free of host read-backs, capturable."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sfd_fast.config import GuidanceConfig, ModelConfig, SamplerConfig
from sfd_fast.models.dit import LightningDiT
from sfd_fast.sampling import guidance
from sfd_fast.sampling import runner as graphs
from sfd_fast.sampling.runner import Conditions, StepRunner, StepRunners
from sfd_fast.sampling.sampler import sample
from sfd_fast.sampling.solvers import make_plan

TINY = ModelConfig(
    hidden_size=32, depth=2, num_heads=2, grid_size=4, texture_channels=4, semantic_channels=2, num_classes=10,
    repa_channels=8, repa_depth=1, repa_hidden=8,
)  # fmt: skip
BATCH, DELTA = 3, 0.3
LABELS = torch.tensor([1, 7, 4])
GUIDED = GuidanceConfig(mode="autoguidance", texture_scale=1.4, semantic_scale=1.8, interval_start=0.2)


def random_model(config=TINY, seed=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LightningDiT(config)
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    return model.eval().requires_grad_(False).to(dtype)


MODEL, GUIDE = random_model(), random_model(replace(TINY, depth=1), 1)
NOISE = torch.randn(BATCH, 6, 4, 4, generator=torch.Generator().manual_seed(0))


def run(config, settings=None, model=MODEL, guide=GUIDE, backend="eager", device="cpu", runner=None):
    plan = make_plan(config, DELTA, settings)
    null = settings is not None and settings.mode == "cfg"
    weak = None if settings is None else (model if null else guide)
    labels = LABELS.to(device)
    weak_labels = torch.full_like(labels, 10) if null else labels
    runner = runner or StepRunner(model, weak, micro_batch_size=BATCH, plan=plan, backend=backend)
    runner.load(plan)
    return runner.run(NOISE.to(device), labels, weak_labels).clone()


def tables(runner):
    """Everything that a step reads and writes, but for the networks' weights."""
    found = [value for value in vars(runner.trajectory).values() if isinstance(value, torch.Tensor)]
    for conditions in (runner.conditions, runner.weak_conditions):
        found += [conditions.labels, conditions.table, *conditions.times]
    assert len(found) >= 12
    return found


def plain(config, settings=None, model=MODEL):
    common = {"num_texture_channels": 4, "delta_t": DELTA}
    velocity = guidance.bind_labels(model, LABELS)
    if settings is not None and settings.mode == "cfg":
        velocity = guidance.cfg(velocity, guidance.bind_null(model, LABELS, 10), settings, **common)
    elif settings is not None:
        velocity = guidance.autoguidance(velocity, guidance.bind_labels(GUIDE, LABELS), settings, **common)
    return sample(velocity, NOISE, config=config, **common)


@pytest.mark.parametrize(
    "settings", [None, GUIDED, GuidanceConfig(mode="cfg", scale=2.0)], ids=["none", "guide", "null"]
)
@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "ab2", "abm3", "rk4"])
def test_steps_over_tables_equal_the_plain_sampler(solver, settings):
    config = SamplerConfig(solver=solver, num_inference_steps=5)
    torch.testing.assert_close(run(config, settings), plain(config, settings), rtol=1e-5, atol=1e-5)


def test_released_grid_keeps_its_coefficients():
    config = SamplerConfig(solver="heun", num_inference_steps=5, grid="released")
    torch.testing.assert_close(run(config, GUIDED), plain(config, GUIDED), rtol=1e-5, atol=1e-5)


def test_a_runner_serves_plans_of_other_lengths_and_shifts_in_the_same_tensors():
    first, second, third = (
        SamplerConfig(num_inference_steps=n, timestep_shift=s) for n, s in ((5, 1.0), (12, 0.5), (4, 2.0))
    )
    runner = StepRunner(MODEL, GUIDE, micro_batch_size=BATCH, plan=make_plan(first, DELTA), backend="eager")
    pointers = [t.data_ptr() for t in tables(runner)]
    for config in (first, second, third, first):
        assert runner.fits(make_plan(config, DELTA))
        assert torch.equal(run(config, GUIDED, runner=runner), run(config, GUIDED))
    assert [t.data_ptr() for t in tables(runner)] == pointers


@pytest.mark.parametrize(
    "config",
    [
        SamplerConfig(num_inference_steps=65),
        SamplerConfig(solver="ab2"),
        SamplerConfig(solver="heun", num_inference_steps=4),
    ],
)
def test_a_runner_takes_no_plan_that_its_tables_have_no_room_for(config):
    plan = make_plan(SamplerConfig(num_inference_steps=5), DELTA)
    runner = StepRunner(MODEL, None, micro_batch_size=BATCH, plan=plan, backend="eager")
    assert not runner.fits(make_plan(config, DELTA))


def test_a_trajectory_copies_into_and_writes_only_static_tensors():
    """What a replay relies on: whatever a trajectory changes keeps its place, other labels and noise included."""
    config = SamplerConfig(num_inference_steps=5)
    plan = make_plan(config, DELTA)
    runner = StepRunner(MODEL, GUIDE, micro_batch_size=BATCH, plan=plan, backend="eager")
    run(config, GUIDED, runner=runner)
    pointers = [t.data_ptr() for t in tables(runner)]
    others = torch.tensor([2, 2, 9])
    out = runner.run(-NOISE, others, others)
    assert [t.data_ptr() for t in tables(runner)] == pointers
    assert out is runner.trajectory.x
    velocity = guidance.autoguidance(
        guidance.bind_labels(MODEL, others), guidance.bind_labels(GUIDE, others), GUIDED, num_texture_channels=4,
        delta_t=DELTA,
    )  # fmt: skip
    expected = sample(velocity, -NOISE, config=config, num_texture_channels=4, delta_t=DELTA)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_the_weak_network_is_left_out_where_it_makes_no_difference():
    calls = []

    class Counting(LightningDiT):
        def forward(self, *args, **kwargs):
            calls.append(1)
            return super().forward(*args, **kwargs)

    guide = Counting(replace(TINY, depth=1)).eval()
    settings = GuidanceConfig(mode="autoguidance", texture_scale=1.5, semantic_scale=1.0)
    run(SamplerConfig(solver="euler", num_inference_steps=13), settings, guide=guide)
    assert len(calls) == 10  # not in the three steps of stage I


def test_times_of_the_grid_are_embedded_once_for_a_trajectory_and_not_per_sample(monkeypatch):
    rows = []
    original = LightningDiT.embed_times

    def counted(self, t_tex, t_sem):
        rows.append(len(t_tex))
        return original(self, t_tex, t_sem)

    monkeypatch.setattr(LightningDiT, "embed_times", counted)
    run(SamplerConfig(solver="heun", num_inference_steps=5), GUIDED)
    assert rows == [10, 10]  # the main network's and the guide's


def test_weights_that_change_in_place_change_the_embedded_times():
    model, config = random_model(), SamplerConfig(num_inference_steps=5)
    runner = StepRunner(model, None, micro_batch_size=BATCH, plan=make_plan(config, DELTA), backend="eager")
    plan = make_plan(config, DELTA)
    before = run(config, model=model, runner=runner)
    model.t_embedder_tex.mlp[0].weight.mul_(2)
    runner.load(plan)
    after = runner.run(NOISE, LABELS, None)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, plain(config, model=model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("two_clocks", [True, False])
def test_conditions_from_embedded_times_equal_the_networks_own(two_clocks):
    model = random_model(replace(TINY, two_clocks=two_clocks))
    conditions = Conditions(model, 8, BATCH)
    t_tex, t_sem = torch.linspace(0, 0.7, 6), torch.linspace(0.2, 1, 6)
    conditions.embed(t_tex, t_sem)
    conditions.labels.copy_(LABELS)
    conditions.fill()
    for e in range(6):
        expected = model.condition(t_tex[e].expand(BATCH), t_sem[e].expand(BATCH), LABELS)
        torch.testing.assert_close(conditions.table[e], expected, rtol=1e-6, atol=1e-7)


def test_bf16_networks_update_an_fp32_state():
    model, guide = random_model(dtype=torch.bfloat16), random_model(replace(TINY, depth=1), 1, torch.bfloat16)
    out = run(SamplerConfig(num_inference_steps=5), GUIDED, model=model, guide=guide)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, plain(SamplerConfig(num_inference_steps=5), GUIDED), rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    "settings", [None, GUIDED, GuidanceConfig(mode="cfg", scale=2.0)], ids=["none", "guide", "null"]
)
def test_compiled_networks_equal_eager_ones(settings):
    config = SamplerConfig(num_inference_steps=5)
    torch.testing.assert_close(run(config, settings, backend="compile"), run(config, settings), rtol=1e-4, atol=1e-5)


SOLVERS = [SamplerConfig(solver="euler", num_inference_steps=4), SamplerConfig(num_inference_steps=4)]


def test_compiled_networks_of_many_sizes_do_not_use_up_the_compilers_limit(monkeypatch):
    original, compiled = torch.compile, []

    def compile_lightly(function, **options):
        compiled.append(function)
        return original(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_lightly)
    runners = StepRunners("compile", torch.device("cpu"))
    plans = [make_plan(config, DELTA) for config in SOLVERS]
    with torch._dynamo.config.patch(recompile_limit=1):
        for batch, plan in ((1, plans[0]), (1, plans[1]), (2, plans[1])):
            runner = runners.get(MODEL, None, batch, plan)
            runner.load(plan)
            runner.run(NOISE[:batch], LABELS[:batch], None)
    assert len(compiled) == 2  # both solvers share the network


def test_cuda_graphs_without_a_cuda_device_are_an_error():
    with pytest.raises(ValueError, match="'cuda_graph' needs a CUDA device, and this pipeline is on cpu"):
        StepRunners("cuda_graph", torch.device("cpu"))


def test_runners_are_kept_by_topology_and_room_for_evaluations():
    runners = StepRunners("eager", torch.device("cpu"))
    plan = make_plan(SamplerConfig(num_inference_steps=5), DELTA)
    first = runners.get(MODEL, GUIDE, 3, plan)
    for num_inference_steps, shift in ((5, 2.0), (6, 1.0), (50, 1.0), (64, 1.0)):
        other = make_plan(SamplerConfig(num_inference_steps=num_inference_steps, timestep_shift=shift), DELTA)
        assert runners.get(MODEL, GUIDE, 3, other) is first
    longer = make_plan(SamplerConfig(num_inference_steps=65), DELTA)
    others = [(None, 3, plan), (MODEL, 3, plan), (GUIDE, 4, plan), (GUIDE, 3, longer)]
    assert len({id(runners.get(MODEL, *other)) for other in others} | {id(first)}) == 5
    assert runners.get(MODEL, GUIDE, 3, make_plan(SamplerConfig(num_inference_steps=120), DELTA)).shape.capacity == 128


def test_of_many_runners_the_least_recently_used_is_dropped():
    runners = StepRunners("eager", torch.device("cpu"))
    plan = make_plan(SamplerConfig(num_inference_steps=5), DELTA)
    made = [runners.get(MODEL, None, batch, plan) for batch in range(1, graphs.MAX_RUNNERS + 1)]
    assert runners.get(MODEL, None, 1, plan) is made[0]
    runners.get(MODEL, None, graphs.MAX_RUNNERS + 1, plan)
    assert len(runners.runners.kept) == graphs.MAX_RUNNERS
    assert runners.get(MODEL, None, 1, plan) is made[0]
    assert runners.get(MODEL, None, 2, plan) is not made[1]


@pytest.mark.parametrize("solver", ["ab2", "abm3", "heun"])
def test_captures_come_after_all_warm_ups_and_replays_give_the_trajectory(solver, monkeypatch):
    """CUDA graphs played by stand-ins on the CPU: a recording runs nothing of its own, a replay repeats the step."""
    events = []

    class Graph:
        def replay(self):
            events.append(("replay", self.piece))
            StepRunner.execute(self.runner, self.piece)

    class Runner(StepRunner):
        recording = None

        def execute(self, piece):
            if Runner.recording is None:
                events.append(("warm up", piece))
                super().execute(piece)
            else:
                events.append(("capture", piece))
                Runner.recording.piece, Runner.recording.runner = piece, self

    @contextlib.contextmanager
    def record(graph, pool):
        Runner.recording = graph
        yield
        Runner.recording = None

    class Stream:
        def wait_stream(self, other):
            events.append(("wait",))

    monkeypatch.setattr(graphs.torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(graphs.torch.cuda, "graph", record)
    monkeypatch.setattr(graphs.torch.cuda, "Stream", Stream)
    monkeypatch.setattr(graphs.torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(graphs.torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    settings = GuidanceConfig(mode="autoguidance", texture_scale=1.4, semantic_scale=1.0)
    config = SamplerConfig(solver=solver, num_inference_steps=6)
    runner = Runner(MODEL, GUIDE, micro_batch_size=BATCH, plan=make_plan(config, DELTA), backend="cuda_graph")
    out = run(config, settings, runner=runner)
    assert torch.equal(out, run(config, settings))
    names = [event[0] for event in events]
    assert names.index("capture") > max(i for i, name in enumerate(names) if name == "warm up")
    assert names.count("capture") == 3  # the conditions, and a step with and without the guide
    assert names.count("warm up") == 3 * graphs.WARM_UP_STEPS
    before = len(events)
    assert torch.equal(run(config, settings, runner=runner), out)
    longer = replace(config, num_inference_steps=9)
    assert torch.equal(run(longer, settings, runner=runner), run(longer, settings))
    assert {event[0] for event in events[before:]} == {"replay"}


def by_views(x, index):
    """Tensor indexing by views: PyTorch's own wants a CUDA runtime even for fake tensors."""
    index = index if isinstance(index, tuple) else (index,)
    named = sum(i is not None and i is not Ellipsis for i in index)
    spread = []
    for i in index:
        spread += [slice(None)] * (x.dim() - named) if i is Ellipsis else [i]
    dim = 0
    for i in spread:
        if i is None:
            x = x.unsqueeze(dim)
        elif isinstance(i, int):
            x = x.select(dim, i)
            continue
        elif i != slice(None):
            x = torch.ops.aten.slice.Tensor(x, dim, i.start, i.stop, i.step or 1)
        dim += 1
    return x


def on_fake_cuda(model):
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                    table[name] = nn.Parameter(fake, requires_grad=False) if table is module._parameters else fake
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", ["euler", "abm3", "rk4"])
def test_a_step_under_fake_cuda_tensors_reads_nothing_back(solver, dtype, monkeypatch):
    """Fake tensors have no values: whatever wanted one on the host would raise DataDependentOutputException."""
    monkeypatch.setattr(torch.Tensor, "__getitem__", by_views)
    dense = {"memory_format": torch.contiguous_format}
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: x if x.is_contiguous() else x.clone(**dense))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda x, y: x.add_(y.expand(x.shape)))  # wants a runtime as well
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    plan = make_plan(SamplerConfig(solver=solver, num_inference_steps=5), DELTA)
    with torch.device("meta"):
        model = LightningDiT(TINY, attention_backend="sdpa").eval().to(dtype)
        guide = LightningDiT(replace(TINY, depth=1), attention_backend="sdpa").eval().to(dtype)
    with FakeTensorMode(), torch.no_grad():
        runner = StepRunner(
            on_fake_cuda(model), on_fake_cuda(guide), micro_batch_size=BATCH, plan=plan, backend="eager"
        )
        assert all(t.device.type == "cuda" for t in tables(runner))
        for piece in StepRunner.PIECES:
            runner.execute(piece)
        with pytest.raises(DataDependentOutputException):
            runner.trajectory.x.sum().item()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings", [None, GUIDED, GuidanceConfig(mode="cfg", scale=2.0)], ids=["none", "guide", "null"]
)
@pytest.mark.parametrize("solver", ["euler", "heun", "ab2", "abm3", "rk4"])
def test_captured_graphs_equal_eager_steps_on_cuda(solver, settings):
    model, guide = random_model().cuda(), random_model(replace(TINY, depth=1), 1).cuda()
    config = SamplerConfig(solver=solver, num_inference_steps=6)
    eager = run(config, settings, model=model, guide=guide, device="cuda")
    captured = run(config, settings, model=model, guide=guide, device="cuda", backend="cuda_graph")
    torch.testing.assert_close(captured, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_trajectory_neither_allocates_nor_synchronises():
    model, guide = random_model().cuda(), random_model(replace(TINY, depth=1), 1).cuda()
    config = SamplerConfig(num_inference_steps=6)
    plan = make_plan(config, DELTA, GUIDED)
    runner = StepRunner(model, guide, micro_batch_size=BATCH, plan=plan, backend="cuda_graph")
    run(config, GUIDED, model=model, guide=guide, device="cuda", runner=runner)
    noise, labels = NOISE.cuda(), LABELS.cuda()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        runner.run(noise, labels, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
