"""One sampler step over static tensors, for replay: eager, compiled, or as a captured CUDA graph.

Everything that changes from step to step (times as conditions, coefficients per stream and history, masks, guidance
weights, the step's number) stands in device tables which the step reads at a device counter. So one captured graph
serves all steps of all stages and all plans that fit its tables, and a trajectory needs neither a host read-back nor
an allocation.
Letters: B micro-batch, C channels, D width of the network, E rows of the tables (evaluations and spare ones), K earlier
velocities kept.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from sfd_kernels import condition_silu, masked_velocity_update
from torch import Tensor, nn

from sfd_fast.config import require
from sfd_fast.diffusion.transport import clocks
from sfd_fast.sampling.solvers import Callback, Plan

WARM_UP_STEPS = 3  # before a capture: lazy initialisation and kernel compilation must not be recorded
SMALLEST_CAPACITY = 64
MAX_RUNNERS = 8


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


class TableShape(NamedTuple):
    """What must agree for a plan to run in a runner's tables, and so in its captured graphs."""

    has_base: bool
    num_history: int
    capacity: int
    """rows: the next power of two from SMALLEST_CAPACITY on, so that most numbers of steps share one runner"""


def table_shape(plan: Plan) -> TableShape:
    capacity = max(SMALLEST_CAPACITY, 1 << (plan.num_evaluations - 1).bit_length())
    return TableShape(plan.has_base, plan.num_history, capacity)


class Conditions:
    """The conditions of one network over the time grid: times embedded once for a plan, labels added per micro-batch.

    table: (E, B, D), written by `fill` from the static tensors `labels` (B,) and the embedded times.
    """

    def __init__(self, network: nn.Module, rows: int, micro_batch_size: int) -> None:
        config, example = network.config, network.pos_embed
        widths = (config.hidden_size // 2,) * 2 if config.two_clocks else (config.hidden_size,)
        like = {"device": example.device, "dtype": example.dtype}
        self.network = network
        self.times = [torch.zeros(rows, width, **like) for width in widths]  # semantic, texture; or the one clock
        self.labels = torch.zeros(micro_batch_size, dtype=torch.int64, device=example.device)
        self.table = torch.zeros(rows, micro_batch_size, config.hidden_size, **like)

    def embed(self, t_tex: Tensor, t_sem: Tensor) -> None:
        """Times of the plan's evaluations, (E,); rows beyond them keep what they hold and are never read."""
        for table, embedded in zip(self.times, self.network.embed_times(t_tex, t_sem)):
            if embedded is not None:
                table[: len(embedded)] = embedded

    def fill(self) -> None:
        """SiLU(times + labels) of every row and sample."""
        rows, batch, _ = self.table.shape
        spread = [t[:, None].expand(-1, batch, -1).flatten(0, 1) for t in self.times]
        e_sem, e_tex = spread if len(spread) == 2 else (spread[0], None)
        e_label = self.network.y_embedder(self.labels).expand(rows, -1, -1).flatten(0, 1)
        self.table.copy_(condition_silu(e_sem, e_tex, e_label).view_as(self.table))


class StepRunner:
    """Runs fixed-grid plans of one shape at one micro-batch size for one pair of networks.

    model: LightningDiT; weak: the guide, the model itself (for the null class), or None; plan: gives the shape of the
    tables (kept velocities, base state, capacity of evaluations); any plan that `fits` can be loaded.
    backend: "eager", "compile" (networks by torch.compile) or "cuda_graph". networks: makes the networks, or hands out
    those of other runners; default: new ones.

    Loading a plan allocates. A trajectory then copies noise and labels into static tensors and runs PIECES: under
    "cuda_graph" these are replays alone, so it neither allocates nor reads anything back to the host; under the other
    backends the networks' activations come from PyTorch's allocator.
    """

    PIECES = ("conditions", "main", "guided")
    """what runs, and is captured, on its own: the conditions of the grid; a step without and with the weak network"""

    def __init__(
        self,
        model: nn.Module,
        weak: nn.Module | None,
        *,
        micro_batch_size: int,
        plan: Plan,
        backend: str,
        pool=None,
        networks: Callable[[nn.Module], Network] | None = None,
    ) -> None:
        self.backend, self.pool = backend, pool
        config = model.config
        self.num_texture_channels = config.texture_channels
        device, self.shape, kept = model.pos_embed.device, table_shape(plan), plan.num_history
        rows = self.shape.capacity
        state = (micro_batch_size, config.channels, config.grid_size, config.grid_size)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.conditions = Conditions(model, rows, micro_batch_size)
        self.weak_conditions = None if weak is None else Conditions(weak, rows, micro_batch_size)
        self.tables = Tables(
            x=zeros(*state),
            base=zeros(*state) if plan.has_base else None,
            history=zeros(kept, *state) if kept else None,
            counter=zeros(1, dtype=torch.int64),
            condition=self.conditions.table,
            weak_condition=None if weak is None else self.weak_conditions.table,
            weights=zeros(rows, 2),
            coefficients=zeros(rows, 2, 1 + kept),
            write_slot=zeros(rows, dtype=torch.int64),
            commit=zeros(rows, dtype=torch.int64),
        )
        networks = networks or partial(conditioned, compiled=backend == "compile")
        self.network = networks(model)
        self.weak_network = None if weak is None else networks(weak)
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self.loaded: tuple[Plan, Tensor] | None = None

    def fits(self, plan: Plan) -> bool:
        """Whether the tables have room for this plan and its kind of solver."""
        shape = table_shape(plan)
        return shape[:2] == self.shape[:2] and plan.num_evaluations <= self.shape.capacity

    @torch.no_grad()
    def load(self, plan: Plan, weights: Tensor, delta_t: float, *, exact: bool) -> None:
        """Puts a plan and its guidance weights (E, 2) into the tables, and embeds its times.

        exact: coefficients as they are (released grid).
        """
        assert self.fits(plan), f"a plan of {table_shape(plan)} in tables of {self.shape}"
        if self.loaded is not None and self.loaded[0] is plan and self.loaded[1] is weights:
            return
        self.loaded = (plan, weights)
        tables, rows = self.tables, plan.num_evaluations
        tables.coefficients[:rows] = (plan.coefficients if exact else plan.float32_coefficients()).to(tables.x)
        tables.weights[:rows] = weights.to(tables.x)
        tables.write_slot[:rows] = plan.write_slot.to(tables.x.device)
        tables.commit[:rows] = plan.commit.to(tables.x.device)
        times = [t.float().to(tables.x.device) for t in clocks(plan.tau, delta_t)]
        self.conditions.embed(*times)
        if self.weak_conditions is not None:
            self.weak_conditions.embed(*times)
        self.ends = plan.commit.tolist()

    def start(self, x0: Tensor, labels: Tensor, weak_labels: Tensor | None) -> None:
        """Puts noise and labels of one micro-batch into place."""
        tables = self.tables
        for buffer in (tables.x, tables.base):
            if buffer is not None:
                buffer.copy_(x0)
        if tables.history is not None:
            tables.history.zero_()
        tables.counter.zero_()
        self.conditions.labels.copy_(labels)
        if self.weak_conditions is not None:
            self.weak_conditions.labels.copy_(weak_labels)

    def execute(self, piece: str) -> None:
        """Runs one of PIECES."""
        if piece == "conditions":
            self.conditions.fill()
            if self.weak_conditions is not None:
                self.weak_conditions.fill()
        else:
            weak = self.weak_network if piece == "guided" else None
            step(self.network, weak, self.tables, self.num_texture_channels)

    def capture(self, pieces: set[str]) -> None:
        """Records those pieces that have no graph yet; all of them are warmed up before the first is recorded."""
        missing = [piece for piece in self.PIECES if piece in pieces and piece not in self.graphs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for piece in missing:
                for _ in range(WARM_UP_STEPS):
                    self.tables.counter.zero_()
                    self.execute(piece)
        torch.cuda.current_stream().wait_stream(stream)
        for piece in missing:
            graph = torch.cuda.CUDAGraph()
            self.tables.counter.zero_()
            with torch.cuda.graph(graph, pool=self.pool):
                self.execute(piece)
            self.graphs[piece] = graph

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
        pieces = ["guided" if guided else "main" for guided in needs_weak]
        execute = self.execute
        if self.backend == "cuda_graph":
            if not {"conditions", *pieces} <= self.graphs.keys():
                self.start(x0, labels, weak_labels)
                self.capture({"conditions", *pieces})
            execute = self._replay
        self.start(x0, labels, weak_labels)
        execute("conditions")
        done = 0
        for piece, ends in zip(pieces, self.ends, strict=True):
            execute(piece)
            done += ends
            if ends and callback is not None:
                callback(done, grid[done], self.tables.x)
        return self.tables.x

    def _replay(self, piece: str) -> None:
        self.graphs[piece].replay()


class Recent:
    """Values by key, made when first asked for; of more than `size` the least recently used is dropped."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.kept: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self.kept:
            while len(self.kept) >= self.size:
                self.kept.popitem(last=False)
            self.kept[key] = make()
        self.kept.move_to_end(key)
        return self.kept[key]


class StepRunners:
    """Step runners by guidance topology and shape of the tables, made when first needed; CUDA graphs share one pool.

    Their graphs never run at the same time and hand nothing over but static tensors, so one pool serves them all. At
    most MAX_RUNNERS are kept, since each holds its tables and graphs.
    """

    def __init__(self, backend: str, device: torch.device) -> None:
        require(
            backend != "cuda_graph" or device.type == "cuda",
            f"backend 'cuda_graph' needs a CUDA device, and this pipeline is on {device}: choose eager or compile",
        )
        self.backend = backend
        self.pool = torch.cuda.graph_pool_handle() if backend == "cuda_graph" else None
        self.runners = Recent(MAX_RUNNERS)
        self.networks = Recent(2 * MAX_RUNNERS)

    def network(self, model: nn.Module, micro_batch_size: int) -> Network:
        """The network at that micro-batch size, compiled where the backend compiles: once for all solvers."""
        return self.networks.get((id(model), micro_batch_size), lambda: conditioned(model, self.backend == "compile"))

    def get(self, model: nn.Module, weak: nn.Module | None, micro_batch_size: int, plan: Plan) -> StepRunner:
        """The runner for this pair of networks, micro-batch size and shape of tables."""
        return self.runners.get(
            (id(model), id(weak), micro_batch_size, table_shape(plan)),
            lambda: StepRunner(
                model,
                weak,
                micro_batch_size=micro_batch_size,
                plan=plan,
                backend=self.backend,
                pool=self.pool,
                networks=partial(self.network, micro_batch_size=micro_batch_size),
            ),
        )


def conditioned(model: nn.Module, compiled: bool) -> Network:
    """The velocity at a condition computed beforehand; REPA features are never asked for."""

    def network(x: Tensor, condition: Tensor) -> Tensor:
        return model(x, None, None, None, condition=condition)

    if not compiled:
        return network
    # torch.compile gives up after eight compilations of one code object, for whatever model and shape: each network
    # gets its own.
    own = FunctionType(network.__code__.replace(), network.__globals__, network.__name__, None, network.__closure__)
    return torch.compile(own, dynamic=False, fullgraph=True)
