"""Fixed-grid solvers as plans: time grids with the stage borders on them, and tables of what to do per evaluation.

A plan has one row per network evaluation, saying at which time to evaluate and how the state of texture and semantics
follows from the result and from earlier ones. One operator, masked_velocity_update, executes a row, so Runge-Kutta and
multistep methods and stage masks share one loop (trajectory.py). A stream is texture or semantics.
Letters: E evaluations, K earlier velocities kept, T steps, S stages of a Runge-Kutta method.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sfd_fast.config import GuidanceConfig, SamplerConfig
from sfd_fast.diffusion.transport import clocks, evaluation_mask, stage_mask
from sfd_fast.sampling.guidance import stream_weights

# (nodes c, matrix rows a, weights b) of explicit Runge-Kutta methods. Heun is the trapezoid rule and rk4 the 3/8
# rule, as in torchdiffeq (heun2, rk4), which the released code calls.
TABLEAUS = {
    "euler": ((0.0,), ((),), (1.0,)),
    "midpoint": ((0.0, 0.5), ((), (0.5,)), (0.0, 1.0)),
    "heun": ((0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    "rk4": ((0.0, 1 / 3, 2 / 3, 1.0), ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}


@dataclass(frozen=True)
class Multistep:
    """An Adams method with one evaluation per step and any step sizes.

    predictor: number of velocities in the Adams-Bashforth formula. corrector: number in the Adams-Moulton formula that
    corrects each step by the evaluation made at its end, which the next step needs anyway (0: none).
    restarts_at_borders: the history of a stream starts anew at every border, else when the stream starts to move. At a
    border the other stream's start or stop puts a kink into the velocity, which spoils every order above 2.
    """

    predictor: int
    corrector: int
    restarts_at_borders: bool

    @property
    def num_history(self) -> int:
        return max(self.predictor - (self.corrector == 0), self.corrector - 1)


MULTISTEPS = {"ab2": Multistep(2, 0, False), "abm3": Multistep(2, 3, True)}


def stage_borders(delta_t: float) -> list[float]:
    """Where streams start or stop to move: [0, delta_t, 1, 1 + delta_t] without repetitions."""
    return sorted({0.0, float(delta_t), 1.0, 1.0 + delta_t})


def _shift(u: Tensor, shift: float) -> Tensor:
    return u if shift == 1 else shift * u / (1 + (shift - 1) * u)


def time_grid(config: SamplerConfig, delta_t: float) -> Tensor:
    """Global times of the steps' ends, from 0 to 1 + delta_t.

    On normalised time u = tau / (1 + delta_t) points are even before the shift u' = s u / (1 + (s - 1) u).
    exact: every stage border is a grid point; each stage gets its share of the steps, at least one, and even points
    between its borders (before the shift). released: linspace(0, 1 + delta_t, num_inference_steps + 1), in float32.
    Returns (num_inference_steps + 1,) float64, or float32 for the released grid.
    Raises ValueError where num_inference_steps is smaller than the number of stages.  Source: docs/METHOD.md 5.
    """
    if config.grid == "released":
        end = 1 + delta_t
        even = torch.linspace(0, end, config.num_inference_steps + 1, dtype=torch.float32) / end
        return _shift(even, config.timestep_shift) * end
    borders = stage_borders(delta_t)
    num_stages = len(borders) - 1
    if config.num_inference_steps < num_stages:
        raise ValueError(
            f"num_inference_steps {config.num_inference_steps} is too small: delta_t {delta_t} has {num_stages} stages "
            f"and each of them needs a step; use num_inference_steps >= {num_stages}"
        )
    s, end = config.timestep_shift, borders[-1]
    u = [b / end / (s - (s - 1) * b / end) for b in borders]  # the inverse of the shift
    shares = [(b - a) * config.num_inference_steps for a, b in zip(u, u[1:])]
    steps = [max(int(share), 1) for share in shares]
    while sum(steps) != config.num_inference_steps:
        sign = 1 if sum(steps) < config.num_inference_steps else -1
        lags = [(share - n) * sign if n + sign >= 1 else float("-inf") for share, n in zip(shares, steps)]
        steps[max(range(num_stages), key=lags.__getitem__)] += sign
    points = [torch.zeros(1, dtype=torch.float64)]
    for i, n in enumerate(steps):
        inside = _shift(torch.linspace(u[i], u[i + 1], n + 1, dtype=torch.float64)[1:-1], s) * end
        points += [inside, torch.tensor([borders[i + 1]], dtype=torch.float64)]
    return torch.cat(points)


Callback = Callable[[int, float, Tensor], Tensor | None]
"""callback(number of steps done, tau, x) after every step; a tensor that it returns goes on in the place of x."""


class Rows(NamedTuple):
    """One row per network evaluation of a fixed-grid solver."""

    tau: Tensor
    """(E,) float64, when to evaluate"""
    coefficients: Tensor
    """(E, 2, 1 + K) float64, weight of the new velocity and of the K kept ones per stream (texture, semantic)"""
    write_slot: Tensor
    """(E,) int64, where the new velocity is kept (-1: nowhere)"""
    commit: Tensor
    """(E,) int64, 1 where the row ends a step"""
    moves: Tensor
    """(E, 2) bool, which streams' velocities are used at all"""
    has_base: bool
    """whether rows start from the state at the step's beginning (Runge-Kutta) or from the latest (multistep)"""


@dataclass(frozen=True, eq=False)
class Plan:
    """What a trajectory does: the rows of its solver, the weights of guidance in each, and the grid of its steps.

    weights: (E, 2) float64; grid: T + 1 times; exact: coefficients are not rounded for a float32 state.
    """

    rows: Rows
    weights: Tensor
    grid: list[float]
    delta_t: float
    exact: bool

    @property
    def num_evaluations(self) -> int:
        return len(self.rows.tau)

    @property
    def num_history(self) -> int:
        return self.rows.coefficients.shape[2] - 1

    @property
    def needs_weak(self) -> list[bool]:
        """Per evaluation, whether the weak velocity makes a difference."""
        return (self.weights != 1).any(dim=1).tolist()

    @property
    def clocks(self) -> tuple[Tensor, Tensor]:
        """(t_tex, t_sem) of every evaluation, each (E,) float64."""
        return clocks(self.rows.tau, self.delta_t)

    def coefficients(self, dtype: torch.dtype) -> Tensor:
        """The coefficients for a state of that dtype, (E, 2, 1 + K)."""
        return self.rows.coefficients if self.exact or dtype == torch.float64 else self.float32_coefficients()

    def float32_coefficients(self) -> Tensor:
        """The coefficients for a float32 state, so rounded that no displacement is lost over many steps.

        Adding a constant h to a float32 state again and again loses the same part of its last bit each time (1e-5 after
        250 steps). So what a stream has moved by after each step is rounded to a multiple of 2^-21, which every state
        below 8 in absolute value takes up exactly: errors stay below 2.4e-7 and do not add up.  Returns (E, 2, 1 + K).
        """
        quantum = 2.0**-21
        coefficients = self.rows.coefficients
        rounded = (coefficients / quantum).round() * quantum
        ends = self.rows.commit.bool()  # of multistep methods: every row
        moved = (coefficients * ends[:, None, None]).sum(2).cumsum(0)
        target = ((moved / quantum).round() * quantum).diff(dim=0, prepend=torch.zeros(1, 2, dtype=torch.float64))
        largest = coefficients.abs().argmax(2, keepdim=True)
        rounded.scatter_add_(2, largest, (target - rounded.sum(2))[:, :, None])
        return torch.where(ends[:, None, None], rounded, coefficients).float()


def _masks(grid: Tensor, times: Tensor, delta_t: float, released: bool) -> Tensor:
    """Which streams each evaluation moves: the mask of its interval (exact grid) or of its own time (released).

    grid: (T + 1,); times: (T, S) of the evaluations of each interval.  Returns (T, S, 2) bool.
    """
    if released:  # compared in float32, as the released code does
        masks = evaluation_mask(times.float(), torch.tensor(delta_t, dtype=torch.float32))
    else:
        masks = stage_mask(grid[:-1, None].expand_as(times), grid[1:, None].expand_as(times), delta_t)
    return torch.stack([torch.as_tensor(mask).expand_as(times) for mask in masks], dim=-1)


def _runge_kutta_rows(solver: str, grid: Tensor, delta_t: float, released: bool) -> Rows:
    nodes, matrix, weights = TABLEAUS[solver]
    num_steps, num_stages = len(grid) - 1, len(nodes)
    steps = grid.diff()
    times = torch.stack([grid[1:] if c == 1 else grid[:-1] + c * steps for c in nodes], dim=1)
    moves = _masks(grid, times, delta_t, released)
    coefficients = torch.zeros(num_steps, num_stages, 2, num_stages, dtype=torch.float64)
    for j in range(num_stages):
        row = matrix[j + 1] if j + 1 < num_stages else weights
        for i, a in enumerate(row):  # the latest velocity stands in column 0, velocity i < j in column 1 + i
            coefficients[:, j, :, 0 if i == j else 1 + i] = a * steps[:, None].double() * moves[:, i]
    return Rows(
        times.double().flatten(),
        coefficients.flatten(0, 1),
        torch.tensor([*range(num_stages - 1), -1]).repeat(num_steps),
        torch.tensor([0] * (num_stages - 1) + [1]).repeat(num_steps),
        moves.flatten(0, 1),
        has_base=num_stages > 1,
    )


def adams_weights(times: list[float], start: float, end: float) -> list[float]:
    """Integrals over [start, end] of the Lagrange polynomials through the given times (Adams-Bashforth, any steps).

    Returns one weight per time, in the same order; they sum to end - start. The times must differ.
    """
    centred = [t - start for t in times]
    weights = []
    for i, node in enumerate(centred):
        polynomial, scale = [1.0], 1.0  # coefficients of prod_j (t - t_j), lowest power first
        for j, other in enumerate(centred):
            if j != i:
                shifted = [0.0, *polynomial]
                polynomial = [a - other * b for a, b in zip(shifted, [*polynomial, 0.0])]
                scale *= node - other
        h = end - start
        weights.append(sum(c * h ** (p + 1) / (p + 1) for p, c in enumerate(polynomial)) / scale)
    return weights


def _multistep_rows(solver: str, grid: Tensor, delta_t: float, released: bool) -> Rows:
    """Row n evaluates at the start of step n, corrects step n - 1 where there is a corrector, and predicts step n.

    In terms of the latest state: x += corrected(n - 1) - predicted(n - 1) + predicted(n), all sums of kept velocities.
    """
    method, times, num_steps = MULTISTEPS[solver], grid.tolist(), len(grid) - 1
    masks = _masks(grid, grid[:-1, None], delta_t, released)[:, 0].tolist()
    rows = [[[0.0] * (1 + method.num_history) for _ in range(2)] for _ in range(num_steps)]
    used = [[False, False] for _ in range(num_steps)]
    first = [[0, 0] for _ in range(num_steps)]  # the earliest evaluation in the history of each stream in each step
    for n in range(1, num_steps):
        for s in range(2):
            restarts = method.restarts_at_borders and masks[n] != masks[n - 1]
            first[n][s] = first[n - 1][s] if released or (masks[n - 1][s] and not restarts) else n

    def add(n: int, s: int, step: int, latest: int, count: int, sign: float) -> None:
        """Adds sign times the integral over `step` of the polynomial through `count` velocities up to `latest`."""
        points = range(latest, max(first[step][s], latest - count + 1) - 1, -1)
        weights = adams_weights([times[i] for i in points], times[step], times[step + 1])
        for i, weight in zip(points, weights):
            if not released or masks[i][s]:
                rows[n][s][0 if i == n else 1 + i % method.num_history] += sign * weight
                used[i][s] = True

    for n in range(num_steps):
        for s in range(2):
            if released or masks[n][s]:
                add(n, s, n, n, method.predictor, 1)
            if method.corrector and n > 0 and (released or masks[n - 1][s]):
                add(n, s, n - 1, n - 1, method.predictor, -1)
                add(n, s, n - 1, n, method.corrector, 1)
    return Rows(
        grid[:-1].double(),
        torch.tensor(rows, dtype=torch.float64),
        torch.arange(num_steps) % method.num_history,
        torch.ones(num_steps, dtype=torch.int64),
        torch.tensor(used),
        has_base=False,
    )


def make_plan(config: SamplerConfig, delta_t: float, guidance: GuidanceConfig | None = None) -> Plan:
    """The plan of a fixed-grid solver (every one but dopri5).

    Exact grid: the mask belongs to the interval, for all its Runge-Kutta stages; each stream has its own multistep
    history (see Multistep). Released grid: the mask of each evaluation belongs to its time, and borders are not known.
    A stream that does not move needs no guidance: its weight is 1.
    """
    grid = time_grid(config, delta_t)
    released = config.grid == "released"
    make_rows = _multistep_rows if config.solver in MULTISTEPS else _runge_kutta_rows
    rows = make_rows(config.solver, grid, delta_t, released)
    weights = torch.ones(len(rows.tau), 2, dtype=torch.float64)
    if guidance is not None and guidance.active:
        weights = torch.stack(stream_weights(*clocks(rows.tau, delta_t), guidance, delta_t), dim=1)
        weights = torch.where(rows.moves, weights, 1.0)
    return Plan(rows, weights, grid.tolist(), delta_t, released)
