"""The one loop of the fixed-grid solvers: the rows of a plan, executed one after the other on static tensors.

Everything that changes from row to row (coefficients per stream and history, guidance weights, the row's number) stands
in tables on the state's device, which a step reads at a counter there. So a step is the same for all rows: it can be
captured once as a CUDA graph, and the loop needs neither a host read-back nor an allocation of its own.
A stream is texture or semantics.
Letters: B batch, C channels, H height, W width, E rows of the tables (evaluations and spare ones), K earlier velocities
kept.
"""

from collections.abc import Callable

import torch
from sfd_kernels import masked_velocity_update
from torch import Tensor

from sfd_fast.sampling.solvers import Callback, Plan

VelocityNow = Callable[[], Tensor]
"""the velocity (B, C, H, W) of a trajectory's state at its present row"""


class Trajectory:
    """A state and the tables that move it.

    plan: gives the shape of the tables (kept velocities, base state); shape: (B, C, H, W); num_rows: room for so many
    evaluations, default the plan's; like: a tensor of the state's device and dtype.
    """

    def __init__(
        self,
        plan: Plan,
        shape: tuple[int, ...],
        *,
        num_texture_channels: int,
        like: Tensor,
        num_rows: int | None = None,
    ) -> None:
        def zeros(*size: int, dtype: torch.dtype = like.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=like.device)

        rows, kept = num_rows or plan.num_evaluations, plan.num_history
        self.num_texture_channels = num_texture_channels
        self.x = zeros(*shape)
        self.base = zeros(*shape) if plan.rows.has_base else None  # the state at the beginning of the step
        self.history = zeros(kept, *shape) if kept else None
        self.counter = zeros(1, dtype=torch.int64)  # evaluations done
        self.weights = zeros(rows, 2)
        self.coefficients = zeros(rows, 2, 1 + kept)
        self.write_slot = zeros(rows, dtype=torch.int64)
        self.commit = zeros(rows, dtype=torch.int64)
        self.plan: Plan | None = None

    def load(self, plan: Plan) -> None:
        """Puts the rows of a plan into the tables; those after them are never read."""
        self.plan, count = plan, plan.num_evaluations
        self.coefficients[:count] = plan.coefficients(self.x.dtype).to(self.x)
        self.weights[:count] = plan.weights.to(self.x)
        self.write_slot[:count] = plan.rows.write_slot.to(self.x.device)
        self.commit[:count] = plan.rows.commit.to(self.x.device)
        self.needs_weak, self.ends = plan.needs_weak, plan.rows.commit.tolist()

    def start(self, x0: Tensor) -> None:
        """Puts noise (B, C, H, W) into place."""
        for state in (self.x, self.base):
            if state is not None:
                state.copy_(x0)
        if self.history is not None:
            self.history.zero_()
        self.counter.zero_()

    def now(self, table: Tensor) -> Tensor:
        """The present row of a table (E, ...), as (1, ...)."""
        return table.index_select(0, self.counter)

    def step(self, main: VelocityNow, weak: VelocityNow | None) -> None:
        """One evaluation and its update, wholly on the device. weak: None leaves guidance out."""
        masked_velocity_update(
            self.x,
            self.base,
            self.history,
            main(),
            None if weak is None else weak(),
            None if weak is None else self.now(self.weights).squeeze(0),
            self.now(self.coefficients).squeeze(0),
            None if self.history is None else self.now(self.write_slot),
            None if self.base is None else self.now(self.commit),
            self.num_texture_channels,
        )
        self.counter.add_(1)

    def run(self, step: Callable[[bool], None], callback: Callback | None) -> Tensor:
        """All rows of the loaded plan from where `start` put the state; step(whether the weak velocity is needed).

        callback(steps done, tau, x) follows every step of the solver; a tensor that it returns goes on in the place of
        x. A multistep method keeps the velocities that it has.
        Returns the state itself (B, C, H, W), which the next trajectory overwrites.
        """
        done = 0
        for guided, ends in zip(self.needs_weak, self.ends, strict=True):
            step(guided)
            done += ends
            if ends and callback is not None:
                self._replace(callback(done, self.plan.grid[done], self.x))
        return self.x

    def _replace(self, changed: Tensor | None) -> None:
        for state in (self.x, self.base):
            if changed is not None and state is not None and state is not changed:
                state.copy_(changed)
