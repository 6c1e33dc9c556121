"""One sampler step over static tensors, for replay: eager, compiled, or as a captured CUDA graph.

Everything that changes from step to step (times as conditions, coefficients per stream and history, masks, guidance
weights, the step's number) stands in device tables which the step reads at a device counter. So one captured graph
serves all steps of all stages, and a trajectory needs neither a host read-back nor an allocation.
Letters: B micro-batch, C channels, D width of the network, E evaluations, K earlier velocities kept.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from sfd_kernels import masked_velocity_update
from torch import Tensor, nn

from sfd_fast.config import require
from sfd_fast.sampler import Callback
from sfd_fast.solvers import Plan
from sfd_fast.transport import clocks

WARM_UP_STEPS = 3  # before a capture: lazy initialisation and kernel compilation must not be recorded


class Tables(NamedTuple):
    """What the steps read, one row per evaluation, and the state that they write."""

    x: Tensor
    """(B, C, H, W) float32, the state"""
    base: Tensor | None
    """(B, C, H, W), the state at the beginning of the step; Runge-Kutta methods only"""
    history: Tensor | None
    """(K, B, C, H, W)"""
    counter: Tensor
    """(1,) int64, number of evaluations done"""
    condition: Tensor
    """(E, B, D), the network's condition at every time"""
    weak_condition: Tensor | None
    """(E, B, D') of the guide or of the null class"""
    weights: Tensor
    """(E, 2) guidance"""
    coefficients: Tensor
    """(E, 2, 1 + K)"""
    write_slot: Tensor
    """(E,) int64"""
    commit: Tensor
    """(E,) int64"""


Network = Callable[[Tensor, Tensor], Tensor]
"""velocity = network(x (B, C, H, W), condition (B, D))"""


def step(network: Network, weak: Network | None, tables: Tables, num_texture_channels: int) -> None:
    """One evaluation and its update, wholly on the device: reads row `counter` of the tables, writes x, advances.

    weak: None leaves guidance out.
    """
    row = tables.counter
    velocity = network(tables.x, tables.condition.index_select(0, row).squeeze(0))
    guide = None
    if weak is not None:
        guide = weak(tables.x, tables.weak_condition.index_select(0, row).squeeze(0))
    masked_velocity_update(
        tables.x,
        tables.base,
        tables.history,
        velocity,
        guide,
        None if weak is None else tables.weights.index_select(0, row).squeeze(0),
        tables.coefficients.index_select(0, row).squeeze(0),
        None if tables.history is None else tables.write_slot.index_select(0, row),
        None if tables.base is None else tables.commit.index_select(0, row),
        num_texture_channels,
    )
    tables.counter.add_(1)


class StepRunner:
    """Runs fixed-grid plans of one shape at one micro-batch size for one pair of networks.

    model: LightningDiT; weak: the guide, the model itself (for the null class), or None; plan: gives the shape of the
    tables (number of evaluations, kept velocities); any plan of that shape can be loaded.
    backend: "eager", "compile" (networks by torch.compile) or "cuda_graph".
    """

    def __init__(
        self, model: nn.Module, weak: nn.Module | None, *, micro_batch_size: int, plan: Plan, backend: str, pool=None
    ) -> None:
        self.model, self.weak, self.backend, self.pool = model, weak, backend, pool
        config = model.config
        self.num_texture_channels = config.texture_channels
        example = model.pos_embed
        device, rows, kept = example.device, plan.num_evaluations, plan.num_history
        state = (micro_batch_size, config.channels, config.grid_size, config.grid_size)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def conditions(network: nn.Module) -> Tensor:
            return zeros(rows, micro_batch_size, network.config.hidden_size, dtype=network.pos_embed.dtype)

        self.tables = Tables(
            x=zeros(*state),
            base=zeros(*state) if plan.has_base else None,
            history=zeros(kept, *state) if kept else None,
            counter=zeros(1, dtype=torch.int64),
            condition=conditions(model),
            weak_condition=None if weak is None else conditions(weak),
            weights=zeros(rows, 2),
            coefficients=zeros(rows, 2, 1 + kept),
            write_slot=zeros(rows, dtype=torch.int64),
            commit=zeros(rows, dtype=torch.int64),
        )
        compiled = backend == "compile"
        self.network = _network(model, compiled)
        self.weak_network = None if weak is None else _network(weak, compiled)
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self.loaded: tuple[Plan, Tensor] | None = None

    def load(self, plan: Plan, weights: Tensor, delta_t: float, *, exact: bool) -> None:
        """Puts a plan and its guidance weights (E, 2) into the tables. exact: coefficients as they are (released
        grid)."""
        if self.loaded is not None and self.loaded[0] is plan and self.loaded[1] is weights:
            return
        self.loaded = (plan, weights)
        tables = self.tables
        tables.coefficients.copy_(plan.coefficients if exact else plan.float32_coefficients())
        tables.weights.copy_(weights)
        tables.write_slot.copy_(plan.write_slot)
        tables.commit.copy_(plan.commit)
        self.times = tuple(t.float().to(tables.x.device) for t in clocks(plan.tau, delta_t))
        self.ends = plan.commit.tolist()

    def start(self, x0: Tensor, labels: Tensor, weak_labels: Tensor | None) -> None:
        """Puts noise and labels of one micro-batch into place; computes the conditions of the whole grid at once."""
        tables = self.tables
        for buffer in (tables.x, tables.base):
            if buffer is not None:
                buffer.copy_(x0)
        if tables.history is not None:
            tables.history.zero_()
        tables.counter.zero_()
        self._fill(self.model, tables.condition, labels)
        if self.weak is not None:
            self._fill(self.weak, tables.weak_condition, weak_labels)

    def _fill(self, network: nn.Module, table: Tensor, labels: Tensor) -> None:
        rows, batch, _ = table.shape
        t_tex, t_sem = (t.repeat_interleave(batch) for t in self.times)
        table.copy_(network.condition(t_tex, t_sem, labels.repeat(rows)).view(table.shape))

    def step(self, guided: bool) -> None:
        """The next evaluation, with or without the weak network."""
        step(self.network, self.weak_network if guided else None, self.tables, self.num_texture_channels)

    def capture(self, variants: set[bool]) -> None:
        """Records the step with and without guidance, as far as the plan uses them; all are warmed up before."""
        missing = sorted(variants - set(self.graphs))
        if not missing:
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for guided in missing:
                for _ in range(WARM_UP_STEPS):
                    self.tables.counter.zero_()
                    self.step(guided)
        torch.cuda.current_stream().wait_stream(stream)
        for guided in missing:
            graph = torch.cuda.CUDAGraph()
            self.tables.counter.zero_()
            with torch.cuda.graph(graph, pool=self.pool):
                self.step(guided)
            self.graphs[guided] = graph

    @torch.no_grad()
    def run(
        self,
        x0: Tensor,
        labels: Tensor,
        weak_labels: Tensor | None,
        needs_weak: list[bool],
        grid: list[float],
        callback: Callback | None = None,
    ) -> Tensor:
        """A whole trajectory of the loaded plan.

        x0 (B, C, H, W), labels (B,), weak_labels (B,): of the guide or null class; needs_weak: for every evaluation;
        grid: times of the steps' ends, for callback(steps done, tau, x).
        Returns the state buffer itself (B, C, H, W), which the next run overwrites.
        """
        if self.backend == "cuda_graph" and not set(needs_weak) <= set(self.graphs):
            self.start(x0, labels, weak_labels)
            self.capture(set(needs_weak))
        self.start(x0, labels, weak_labels)
        done = 0
        for guided, ends in zip(needs_weak, self.ends, strict=True):
            if self.backend == "cuda_graph":
                self.graphs[guided].replay()
            else:
                self.step(guided)
            done += ends
            if ends and callback is not None:
                callback(done, grid[done], self.tables.x)
        return self.tables.x


class StepRunners:
    """Step runners by guidance topology and shape of the plan, made when first needed; CUDA graphs share one pool.

    Their graphs never run at the same time and hand nothing over but static tensors, so one pool serves them all.
    """

    def __init__(self, backend: str, device: torch.device) -> None:
        require(
            backend != "cuda_graph" or device.type == "cuda",
            f"backend 'cuda_graph' needs a CUDA device, and this pipeline is on {device}: choose eager or compile",
        )
        self.backend = backend
        self.pool = torch.cuda.graph_pool_handle() if backend == "cuda_graph" else None
        self.runners: dict[tuple, StepRunner] = {}

    def get(self, model: nn.Module, weak: nn.Module | None, micro_batch_size: int, plan: Plan) -> StepRunner:
        """The runner for this pair of networks, micro-batch size and shape of plan."""
        key = (id(model), id(weak), micro_batch_size, plan.num_evaluations, plan.num_history, plan.has_base)
        if key not in self.runners:
            self.runners[key] = StepRunner(
                model, weak, micro_batch_size=micro_batch_size, plan=plan, backend=self.backend, pool=self.pool
            )
        return self.runners[key]


def _network(model: nn.Module, compiled: bool) -> Network:
    """The velocity at a condition computed beforehand; REPA features are never asked for."""

    def network(x: Tensor, condition: Tensor) -> Tensor:
        return model(x, None, None, None, condition=condition)

    return torch.compile(network, dynamic=False, fullgraph=True) if compiled else network
