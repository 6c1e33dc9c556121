"""Labels in, composite latents out: the networks of a pipeline, their weights, runners and turns.

Letters: B micro-batch, C channels, H height, W width.
"""

import copy
import functools
import logging
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sfd_fast.config import GuidanceConfig, ModelConfig, SamplerConfig, SamplingBackend, require
from sfd_fast.config.checks import one_of
from sfd_fast.diffusion import random_numbers
from sfd_fast.diffusion.transport import noise
from sfd_fast.files.tensors import require_finite
from sfd_fast.models.processor import has_bf16_units
from sfd_fast.sampling.allocator import keep_freed_memory
from sfd_fast.sampling.guidance import Velocity, autoguidance, bind_labels, bind_null, cfg
from sfd_fast.sampling.runner import Recent, StepRunners
from sfd_fast.sampling.sampler import sample
from sfd_fast.sampling.solvers import Callback, Plan, make_plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""what the networks' weights may be held in, by the names of --precision"""
MAX_PLANS = 64  # kept settings of earlier calls
PROCESS_OWN = ("runners", "_plans", "_lock", "_last_queue", "_place_lock")
"""attributes that are not pickled: a copy makes them anew"""

log = logging.getLogger(__name__)


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raises ValueError for a dtype that the networks cannot be held in."""
    require(
        dtype is None or dtype in DTYPES.values(),
        f"torch_dtype {dtype} is unknown; choose torch.float32 or torch.bfloat16 (None: the best for the device)",
    )


def own_copy(module: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """The module in eval mode and without gradients, as a copy that leaves the given one as it is.

    Weights are shared where device and dtype agree: changing them in place changes both.
    """
    shared: dict[int, object] = {id(buffer): buffer.detach() for buffer in module.buffers()}
    shared |= {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in module.parameters()}
    return copy.deepcopy(module, shared).eval().to(device, dtype)


def chosen_for(device: torch.device, dtype: torch.dtype | None, backend: SamplingBackend) -> tuple[torch.dtype, str]:
    """The networks' dtype, None: the best for the device, and what backend "auto" means on it.

    CUDA: bf16 from compute capability 8 on (below it bf16 is software), and captured graphs. A CPU with bf16 units
    (AMX, AVX512_BF16): bf16, eager. Else fp32, eager.
    """
    cuda = device.type == "cuda"
    fast = torch.cuda.get_device_capability(device)[0] >= 8 if cuda else device.type == "cpu" and has_bf16_units()
    chosen = (
        dtype or (torch.bfloat16 if fast else torch.float32),
        ("cuda_graph" if cuda else "eager") if backend == "auto" else backend,
    )
    if fast and dtype is None or cuda and chosen != (dtype, backend):
        say_once("sampling in %s with backend %s; torch_dtype (--precision) and backend name others", *chosen)
    return chosen


@functools.cache
def say_once(message: str, *values: object) -> None:
    log.info(message, *values)


class LatentSampler:
    """The networks of a pipeline on their device.

    The given networks stay as they are: it works with copies in eval mode, which share their weights where device and
    dtype agree. Several threads may call it: micro-batches take turns. It can be pickled.
    Raises ValueError for unknown settings, and for weights that are not finite.
    """

    def __init__(
        self,
        transformer: nn.Module,
        guide: nn.Module | None,
        delta_t: float,
        *,
        torch_dtype: torch.dtype | None,
        backend: SamplingBackend,
        device: torch.device | str | None,
        keep_memory: bool,
    ) -> None:
        check_dtype(torch_dtype)
        one_of("backend", backend, SamplingBackend)
        for name, part in (("transformer", transformer), ("guide", guide)):
            if part is not None:
                require_finite(part.state_dict(), f"the {name}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._asked_backend = backend
        self.dtype, self.backend = chosen_for(self.device, torch_dtype, backend)
        self.delta_t, self.keep_memory = delta_t, keep_memory
        self.rounded = transformer.pos_embed.dtype == torch.bfloat16 or self.dtype == torch.bfloat16
        self.transformer = own_copy(transformer, self.device, self.dtype)
        self.guide = None if guide is None else own_copy(guide, self.device, self.dtype)
        self.offloads = False
        self._said_eager = False
        self._start()

    @property
    def precision(self) -> str:
        """The name that --precision has for the networks' dtype."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def _start(self) -> None:
        """What belongs to this process: see PROCESS_OWN."""
        if self.keep_memory and self.device.type == "cpu":
            keep_freed_memory()
        self.runners = StepRunners(self.backend, self.device)
        self._place_lock = threading.RLock()
        self._plans = Recent(MAX_PLANS)
        self._lock = threading.Lock()
        self._last_queue: torch.cuda.Stream | None = None

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in PROCESS_OWN}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._start()

    @property
    def config(self) -> ModelConfig:
        return self.transformer.config

    def velocity(self, labels: Tensor, guidance: GuidanceConfig) -> Velocity:
        """The guided velocity function for labels (B,) on the pipeline's device; compiled under backend compile."""
        model, guide = self._timed(self.transformer), self._timed(self.guide)
        main = bind_labels(model, labels)
        common = {"num_texture_channels": self.config.texture_channels, "delta_t": self.delta_t}
        if guidance.mode == "autoguidance" and guidance.active:
            return autoguidance(main, bind_labels(guide, labels), guidance, **common)
        if guidance.mode == "cfg":
            return cfg(main, bind_null(model, labels, self.config.num_classes), guidance, **common)
        return main

    def _timed(self, model: nn.Module | None) -> Callable | None:
        """model(x, t_tex, t_sem, labels) for solvers that choose their times: all but the condition compiled."""
        if model is None or self.backend != "compile":
            return model

        def timed(x: Tensor, t_tex: Tensor, t_sem: Tensor, labels: Tensor) -> Tensor:
            return self.runners.network(model, len(x))(x, model.condition(t_tex, t_sem, labels))

        return timed

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the composite latents of one image."""
        return (self.config.channels, self.config.grid_size, self.config.grid_size)

    def initial_noise(self, sample_ids: Tensor, seed: int) -> Tensor:
        """x at tau = 0: (B, C, H, W) float32."""
        return noise(self._on_device(sample_ids), self.latent_shape, seed, random_numbers.SAMPLE_NOISE)

    def _on_device(self, values: Tensor) -> Tensor:
        """A copy that does not wait for what the device is still doing."""
        if self.device.type != "cuda" or values.device.type == "cuda":
            return values.to(self.device)
        return values.pin_memory().to(self.device, non_blocking=True)

    def sample_latents(
        self,
        labels: Tensor,
        x0: Tensor,
        sampler: SamplerConfig,
        guidance: GuidanceConfig,
        callback: Callback | None = None,
    ) -> Tensor:
        """Composite latents of one full micro-batch: labels (B,), noise x0 (B, C, H, W) float32.

        The network's part of a fixed-step trajectory is allocation-free under backend cuda_graph (runner.py); noise,
        labels and result of each micro-batch come from PyTorch's allocator.
        Returns (B, C, H, W) float32.
        """
        # tensors that are kept for later calls must be ordinary ones, whatever mode the first call runs in
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._follow_last_call()
            labels, x0 = self._on_device(labels), self._on_device(x0)
            if sampler.solver == "dopri5":
                self._say_eager()
                return sample(
                    self.velocity(labels, guidance),
                    x0,
                    delta_t=self.delta_t,
                    config=sampler,
                    num_texture_channels=self.config.texture_channels,
                    callback=callback,
                )
            plan = self.plan(sampler, guidance)
            weak = weak_labels = None
            if any(plan.needs_weak):
                null = guidance.mode == "cfg"
                weak = self.transformer if null else self.guide
                weak_labels = torch.full_like(labels, self.config.num_classes) if null else labels
            runner = self.runners.get(self.transformer, weak, len(labels), plan)
            runner.load(plan)
            return runner.run(x0, labels, weak_labels, callback).clone()

    def plan(self, sampler: SamplerConfig, guidance: GuidanceConfig) -> Plan:
        """The plan of a solver with fixed steps, made once."""
        return self._plans.get((sampler, guidance), lambda: make_plan(sampler, self.delta_t, guidance))

    def _follow_last_call(self) -> None:
        """Calls share static tensors: work on another CUDA stream than the last call's waits for that on the device."""
        if self.device.type != "cuda":
            return
        queue = torch.cuda.current_stream(self.device)
        if self._last_queue is not None and self._last_queue != queue:
            queue.wait_stream(self._last_queue)
        self._last_queue = queue

    def _say_eager(self) -> None:
        if self.backend == "cuda_graph" and not self._said_eager:
            self._said_eager = True
            log.warning(
                "solver dopri5 chooses its steps on the host, so backend cuda_graph does not apply and its networks "
                "run eagerly: use backend compile, or a solver with fixed steps (%s)",
                SamplerConfig().solver,
            )
