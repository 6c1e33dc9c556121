"""Guidance: two velocity functions in, one velocity function out.

v = v_weak + w (v_main - v_weak) per stream; the weak velocity is the null class (CFG) or a worse model (AutoGuidance).
Letters: B batch, C channels, H height, W width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfd_fast.config import GuidanceConfig
from sfd_fast.diffusion.transport import clocks, join_latents, split_latents

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""v(x (B, C, H, W), t_tex (B,), t_sem (B,)) -> (B, C, H, W), labels bound."""


def stream_weights(t_tex: Tensor, t_sem: Tensor, config: GuidanceConfig, delta_t: float) -> tuple[Tensor, Tensor]:
    """Guidance weights (texture, semantic) at the given times; 1 means that the main velocity is used alone.

    Strictly below interval_start on its own clock a stream named by interval_mode is not guided. With delta_t = 0 there
    is one clock, and the interval applies to all channels whatever the mode.
    t_tex, t_sem: (...).  Returns two tensors (...) of their dtype.  Source: docs/METHOD.md 5.
    """
    weights = []
    for name, time, scale in zip(("tex", "sem"), (t_tex, t_sem), config.scales):
        applies = delta_t == 0 or config.interval_mode in ("both", name)
        weight = torch.full_like(time, scale)
        weights.append(torch.where(time < config.interval_start, 1.0, weight) if applies else weight)
    return weights[0], weights[1]


@dataclass(frozen=True)
class Guided:
    """A guided velocity function that keeps its two parts, so that a sampler can fuse guidance with its update.

    Called as a velocity function it evaluates both parts and mixes them with the weights of each sample's own times: no
    host read-back. Samplers know the weights of a fixed grid, or of a stage, beforehand and leave out evaluations of
    weight 1.
    """

    main: Velocity
    weak: Velocity
    config: GuidanceConfig
    num_texture_channels: int
    delta_t: float

    def __call__(self, x: Tensor, t_tex: Tensor, t_sem: Tensor) -> Tensor:
        velocity, weak = self.main(x, t_tex, t_sem), self.weak(x, t_tex, t_sem)
        weights = stream_weights(t_tex, t_sem, self.config, self.delta_t)
        streams = zip(
            split_latents(velocity, self.num_texture_channels), split_latents(weak, self.num_texture_channels), weights
        )
        return join_latents(*(self._mix(v, g, w.view(-1, 1, 1, 1).to(v.dtype)) for v, g, w in streams))

    def needed(self, tau: Tensor, moves: tuple[bool | Tensor, bool | Tensor]) -> Velocity:
        """This function, or the main velocity alone where no stream that moves (texture, semantic) is guided at tau.

        Weights never fall with time, so what suffices at the end of a stage suffices in all of it. tau: one number, on
        the host: the answer steers the host.
        """
        weights = stream_weights(*clocks(tau, self.delta_t), self.config, self.delta_t)
        return self if any(moved and weight != 1 for moved, weight in zip(moves, weights)) else self.main

    @staticmethod
    def _mix(velocity: Tensor, weak: Tensor, weight: Tensor) -> Tensor:
        # A weight of 1 returns the main velocity's own bits, whatever the weak one holds.
        return torch.where(weight == 1, velocity, weak + weight * (velocity - weak))


def check_scales(config: GuidanceConfig, delta_t: float) -> None:
    """Raises ValueError for separate scales with one clock, which has one stream only (docs/METHOD.md 5)."""
    texture, semantic = config.scales
    if delta_t == 0 and texture != semantic:
        raise ValueError(
            f"separate guidance scales (texture {texture}, semantic {semantic}) need two clocks, but delta_t is 0: "
            "set guidance.scale alone"
        )


def _guided(
    main: Velocity, weak: Velocity, config: GuidanceConfig, num_texture_channels: int, delta_t: float
) -> Velocity:
    check_scales(config, delta_t)
    return Guided(main, weak, config, num_texture_channels, delta_t) if config.active else main


def cfg(
    conditional: Velocity, null: Velocity, config: GuidanceConfig, *, num_texture_channels: int, delta_t: float
) -> Velocity:
    """Classifier-free guidance: v = v_null + w (v_cond - v_null) on all channels.

    conditional, null: velocity functions with the labels and with the null class bound. Weights of 1 return
    `conditional` itself, so that the null class is never evaluated.
    Raises ValueError for separate scales where delta_t is 0.  Source: Ho and Salimans (arXiv 2207.12598).
    """
    return _guided(conditional, null, config, num_texture_channels, delta_t)


def autoguidance(
    main: Velocity, guide: Velocity, config: GuidanceConfig, *, num_texture_channels: int, delta_t: float
) -> Velocity:
    """AutoGuidance: v = v_guide + w (v_main - v_guide), both with the label; texture and semantics may differ in w.

    Weights of 1 return `main` itself, so that the guide is never evaluated.
    Raises ValueError for separate scales where delta_t is 0.  Source: Karras et al. (arXiv 2406.02507).
    """
    return _guided(main, guide, config, num_texture_channels, delta_t)


def bind_labels(model: Callable, labels: Tensor) -> Velocity:
    """The velocity function of a model for given labels: v(x, t_tex, t_sem) = model(x, t_tex, t_sem, labels)."""
    return lambda x, t_tex, t_sem: model(x, t_tex, t_sem, labels)


def bind_null(model: Callable, labels: Tensor, num_classes: int) -> Velocity:
    """The velocity function of the null class, the row after the last class, for as many samples as there are
    labels."""
    return bind_labels(model, torch.full_like(labels, num_classes))
