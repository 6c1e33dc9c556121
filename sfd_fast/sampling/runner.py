"""Trajectories of the network for replay: eager, compiled, or with a step as a captured CUDA graph.

A runner computes the network's conditions of all rows before the loop, so a step runs the network and one update and
nothing else. One captured step serves all stages and all plans that fit its tables.
Letters: B micro-batch, C channels, D width of the network, E rows of the tables (evaluations and spare ones).
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from sfd_kernels import condition_silu
from torch import Tensor, nn

from sfd_fast.config import require
from sfd_fast.sampling.solvers import Callback, Plan
from sfd_fast.sampling.trajectory import Trajectory

WARM_UP_STEPS = 3  # before a capture: lazy initialisation and kernel compilation must not be recorded
SMALLEST_CAPACITY = 64
MAX_RUNNERS = 8

Network = Callable[[Tensor, Tensor], Tensor]
"""velocity = network(x (B, C, H, W), condition (B, D))"""


class TableShape(NamedTuple):
    """What must agree for a plan to run in a runner's tables, and so in its captured graphs."""

    has_base: bool
    num_history: int
    capacity: int
    """rows: the next power of two from SMALLEST_CAPACITY on, so that most numbers of steps share one runner"""


def table_shape(plan: Plan) -> TableShape:
    capacity = max(SMALLEST_CAPACITY, 1 << (plan.num_evaluations - 1).bit_length())
    return TableShape(plan.rows.has_base, plan.num_history, capacity)


class Conditions:
    """The conditions of one network over the time grid: times embedded once for all samples, labels added to each.

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
            table[: len(t_tex)] = embedded

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
        self.backend, self.pool, self.shape = backend, pool, table_shape(plan)
        config, rows = model.config, self.shape.capacity
        self.trajectory = Trajectory(
            plan,
            (micro_batch_size, config.channels, config.grid_size, config.grid_size),
            num_texture_channels=config.texture_channels,
            like=torch.empty(0, dtype=torch.float32, device=model.pos_embed.device),
            num_rows=rows,
        )
        self.conditions = Conditions(model, rows, micro_batch_size)
        self.weak_conditions = None if weak is None else Conditions(weak, rows, micro_batch_size)
        networks = networks or partial(conditioned, compiled=backend == "compile")
        self.network = networks(model)
        self.weak_network = None if weak is None else networks(weak)
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self.clocks: list[Tensor] = []

    def fits(self, plan: Plan) -> bool:
        """Whether the tables have room for this plan and its kind of solver."""
        shape = table_shape(plan)
        return shape[:2] == self.shape[:2] and plan.num_evaluations <= self.shape.capacity

    @torch.no_grad()
    def load(self, plan: Plan) -> None:
        """Puts a plan into the tables and embeds its times with the networks' weights as they are now."""
        assert self.fits(plan), f"a plan of {table_shape(plan)} in tables of {self.shape}"
        if self.trajectory.plan is not plan:
            self.trajectory.load(plan)
            self.clocks = [t.float().to(self.trajectory.x.device) for t in plan.clocks]
        for conditions in (self.conditions, self.weak_conditions):
            if conditions is not None:
                conditions.embed(*self.clocks)

    def start(self, x0: Tensor, labels: Tensor, weak_labels: Tensor | None) -> None:
        """Puts noise and labels of one micro-batch into place."""
        self.trajectory.start(x0)
        self.conditions.labels.copy_(labels)
        if self.weak_conditions is not None:
            self.weak_conditions.labels.copy_(weak_labels)

    def execute(self, piece: str) -> None:
        """Runs one of PIECES."""
        if piece == "conditions":
            self.conditions.fill()
            if self.weak_conditions is not None:
                self.weak_conditions.fill()
            return
        weak = partial(self._velocity, self.weak_network, self.weak_conditions) if piece == "guided" else None
        self.trajectory.step(partial(self._velocity, self.network, self.conditions), weak)

    def _velocity(self, network: Network, conditions: Conditions) -> Tensor:
        return network(self.trajectory.x, self.trajectory.now(conditions.table).squeeze(0))

    def capture(self, pieces: set[str]) -> None:
        """Records those pieces that have no graph yet; all of them are warmed up before the first is recorded."""
        missing = [piece for piece in self.PIECES if piece in pieces and piece not in self.graphs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for piece in missing:
                for _ in range(WARM_UP_STEPS):
                    self.trajectory.counter.zero_()
                    self.execute(piece)
        torch.cuda.current_stream().wait_stream(side)
        for piece in missing:
            graph = torch.cuda.CUDAGraph()
            self.trajectory.counter.zero_()
            with torch.cuda.graph(graph, pool=self.pool):
                self.execute(piece)
            self.graphs[piece] = graph

    @torch.no_grad()
    def run(self, x0: Tensor, labels: Tensor, weak_labels: Tensor | None, callback: Callback | None = None) -> Tensor:
        """A whole trajectory of the loaded plan.

        x0 (B, C, H, W), labels (B,), weak_labels (B,): of the guide or null class; callback(steps done, tau, x).
        Returns the state buffer itself (B, C, H, W), which the next run overwrites.
        """
        execute = self.execute
        if self.backend == "cuda_graph":
            pieces = {"conditions", *("guided" if guided else "main" for guided in self.trajectory.needs_weak)}
            if not pieces <= self.graphs.keys():
                self.start(x0, labels, weak_labels)
                self.capture(pieces)
            execute = self._replay
        self.start(x0, labels, weak_labels)
        execute("conditions")
        return self.trajectory.run(lambda guided: execute("guided" if guided else "main"), callback)

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
