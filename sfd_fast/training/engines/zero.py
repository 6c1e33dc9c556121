"""Where ZeRO keeps fp32 weights and their optimizer state: read and written as pieces of named parameters.

Stages: 0 shards nothing, 1 and 2 the masters and their state, 3 the weights too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfd_fast.training.optimizer import AdamWEMA
from sfd_fast.training.state import STEP, Piece, StateReader, restore, whole_piece


@dataclass
class Masters:
    """The fp32 weights that the optimizer updates, on this rank."""

    zero: Any
    """DeepSpeed's ZeRO optimizer; None in stage 0"""
    stage: int
    named: dict[str, Tensor]
    """the network's parameters that are trained"""
    shapes: dict[str, torch.Size]
    optimizer: AdamWEMA
    rank: int

    def __post_init__(self) -> None:
        """fp32 weights are their own masters under ZeRO 3: 4 bytes a parameter less, over the ranks.

        DeepSpeed 0.19.8 means to do this, but compares a torch.device with a string, which is never equal.
        """
        if self.stage < 3:
            return
        for weights, masters in zip(self.zero.fp16_partitioned_groups_flat, self.zero.fp32_partitioned_groups_flat):
            if weights is not None and weights.dtype == masters.dtype and weights.device == masters.device:
                masters.data = weights.data

    def shards(self) -> Iterator[tuple[str, Tensor, int, int, int]]:
        """(name, flat fp32 tensor, offset in it, first element of the parameter, number of elements) of this rank.

        The flat tensor is the one that the optimizer's state is keyed by. Without sharding every rank has everything.
        """
        if self.stage == 0:
            for name, param in self.named.items():
                yield name, param, 0, 0, param.numel()
        elif self.stage == 3:
            for name, param in self.named.items():
                group, offset, _ = self.zero.grad_position[self.zero.get_param_id(param)]
                length = param.partition_numel()
                start = self.rank * length
                count = min(length, max(0, param.ds_numel - start))
                if count:
                    yield name, self.zero.fp32_partitioned_groups_flat[group], offset, start, count
        else:
            groups = {id(p): i for i, group in enumerate(self.zero.bit16_groups) for p in group}
            for name, param in self.named.items():
                mapping = param._hp_mapping
                if mapping is not None:
                    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                    flat = self.zero.single_partition_of_fp32_groups[groups[id(param)]]
                    yield name, flat, high.start, low.start, low.numel

    def pieces(self) -> Iterator[Piece]:
        """What this rank stores of them, as views: without sharding the first rank stores everything."""
        for name, flat, offset, start, count in self.shards() if self.stage or self.rank == 0 else ():
            whole = whole_piece(name, flat, self.optimizer.state.get(flat, {}))
            fields = {k: v if k == STEP else v[offset : offset + count] for k, v in whole.fields.items()}
            yield Piece(name, start, self.shapes[name].numel(), fields)

    def read(self, reader: StateReader) -> None:
        """Fills masters, moments and averages from a checkpoint: no collectives. refresh() must follow."""
        for name, flat, offset, start, count in self.shards():
            reader.check_size(name, self.shapes[name])
            restore(reader, self.optimizer, name, flat, offset, start, count)

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the network's weights those of the masters."""
        if self.stage == 3:
            # gathered copies, small parameters' included, are of the old weights
            self.zero._partition_all_parameters()
            for group in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
            self.gather_persistent()
        elif self.stage > 0:
            self.zero.update_lp_params()

    def gather_persistent(self) -> None:
        """Makes the small parameters whole that DeepSpeed expects to find so under ZeRO 3."""
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    @torch.no_grad()
    def show(self, key: str) -> list[tuple[Tensor, Tensor]]:
        """Puts state `key` in place of the masters and refreshes; returns the masters' values for put_back."""
        flats = {id(flat): flat for _, flat, *_ in self.shards()}
        shown = [flat for flat in flats.values() if key in self.optimizer.state.get(flat, {})]
        masters = [(flat, flat.detach().clone()) for flat in shown]
        for flat in shown:
            flat.data.copy_(self.optimizer.state[flat][key])
        self.refresh()
        return masters

    @torch.no_grad()
    def put_back(self, masters: list[tuple[Tensor, Tensor]]) -> None:
        for flat, old in masters:
            flat.data.copy_(old)
        self.refresh()
