"""Bytes that one training step of the network keeps on a device, counted by running it on tensors without data.

Nothing is allocated or computed: shapes pass through forward and backward under autocast as in training, and every
storage is counted while it lives. The operators of the kernel library take part like any other.
"""

import weakref
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from sfd_fast.config import ModelConfig, TransportConfig
from sfd_fast.diffusion.transport import loss
from sfd_fast.models.dit import LightningDiT
from sfd_fast.training.engines.interface import stays_fp32


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators create, and the most that lived at once.

    Shapes of the library's operators are worked out once for each kind of arguments: their fake kernels run whole
    references, and a network repeats them in every block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()
        self.shapes: dict[tuple, list] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:
            return args[0].fake_device  # most calls are these, and none creates anything
        if function.namespace == "sfd" and not kwargs:
            out = self.repeated(function, args)
        else:
            out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.count(leaf.untyped_storage())
        return out

    def repeated(self, function, args: tuple):
        """What function(*args) returns: new tensors, of the shapes of an earlier call where there was one like it."""
        leaves, _ = tree_flatten(args)
        key = function, *((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in leaves)
        if key not in self.shapes:
            out = function(*args)
            flat, structure = tree_flatten(out)
            made = [(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in flat]
            self.shapes[key] = [made, structure]
            return out
        made, structure = self.shapes[key]
        flat = [
            torch.empty_strided(size[0], size[1], dtype=size[2]) if isinstance(size, tuple) else size for size in made
        ]
        return tree_unflatten(flat, structure)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leaves out storages that are counted elsewhere."""
        self.known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def step_bytes(
    model: ModelConfig,
    transport: TransportConfig,
    *,
    micro_batch: int,
    checkpoint_activations: float,
    precision: str,
    residual: str = "fp32",
    keep_gradients: bool = False,
) -> int:
    """Most bytes alive at once during forward and backward of one micro-batch, beyond the weights and the batch.

    keep_gradients: they stay until the step (ZeRO 0), or leave as soon as they are complete (ZeRO 1 to 3).
    """
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        network = LightningDiT(model, residual=residual, checkpoint_activations=checkpoint_activations)
        if precision in ("bf16", "fp16"):
            keep = set(stays_fp32(network))
            for name, param in network.named_parameters():
                if name not in keep:
                    param.data = param.data.to(torch.bfloat16)
        if not keep_gradients:
            for param in network.parameters():
                if param.requires_grad:
                    param.register_post_accumulate_grad_hook(drop_gradient)
        shape = (micro_batch, model.channels, model.grid_size, model.grid_size)
        batch = [torch.empty(shape), torch.empty(shape), torch.empty(micro_batch)]
        labels = torch.empty(micro_batch, dtype=torch.int64)
        features = torch.empty(micro_batch, model.num_tokens, model.repa_channels) if model.repa_channels else None
        counter = LiveBytes()
        counter.ignore([*network.parameters(), *network.buffers(), *batch, labels])
        autocast = nullcontext() if precision == "fp32" else torch.autocast("cpu", torch.bfloat16)
        with counter:
            with autocast:
                total, _ = loss(
                    network, *batch, labels, config=transport, num_texture_channels=model.texture_channels,
                    features=features,
                )  # fmt: skip
            total.backward()
        return counter.peak


def drop_gradient(param: Tensor) -> None:
    param.grad = None
