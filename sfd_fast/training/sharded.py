"""Training state by parameter name: pieces of flattened parameters with their moments and averages, from any sharding.

A rank writes the pieces that it owns, [start, stop) of a flattened parameter, into state-RANK.safetensors. Any number
of ranks, under any ZeRO stage or none, reads the pieces that it needs, so a checkpoint does not depend on how it was
sharded. DeepSpeed's universal checkpoint knows only weights and Adam moments and would drop the averages.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfd_fast.training.optimizer import AdamWEMA

SEPARATOR = "|"
METADATA = "sfd_fast"
WEIGHT = "param"
"""the field of the fp32 weight itself; the others carry the optimizer's names: exp_avg, exp_avg_sq, ema, ema_1, step"""


@dataclass
class Piece:
    """[start, start + n) of a flattened parameter: views of the weight and its state, all 1-D of n elements.

    `step` (0-dim) is the exception: it belongs to the parameter as a whole.
    """

    name: str
    start: int
    fields: dict[str, Tensor]

    @property
    def stop(self) -> int:
        return self.start + self.fields[WEIGHT].numel()


def snapshot_pieces(pieces: Iterable[Piece]) -> list[Piece]:
    """Copies on the CPU, so that a thread can write them while training goes on."""
    return [
        Piece(p.name, p.start, {k: v.detach().to("cpu", copy=True).contiguous() for k, v in p.fields.items()})
        for p in pieces
    ]


def write_pieces(path: Path, pieces: Iterable[Piece], extra: dict[str, Tensor] | None = None) -> None:
    """One rank's file. extra: whole tensors that are not sharded, under their names."""
    pieces = list(pieces)
    tensors = {f"{p.name}{SEPARATOR}{field}": value for p in pieces for field, value in p.fields.items()}
    ranges = {p.name: [p.start, p.stop] for p in pieces}
    save_file(tensors | (extra or {}), path, {METADATA: json.dumps(ranges, sort_keys=True)})


class StateReader:
    """Reads weights, moments and averages of a checkpoint folder by parameter name, whoever wrote it.

    Use as a context manager: the files stay open inside.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: list = []
        self.places: dict[str, list[tuple[int, int, object]]] = defaultdict(list)
        """name -> (start, stop, file) of every piece"""
        self.keys: dict[int, set[str]] = {}
        self.whole = (folder / "model.safetensors").is_file()

    def __enter__(self) -> "StateReader":
        names = ["model.safetensors", "optimizer.safetensors"] if self.whole else []
        paths = [self.folder / n for n in names] or sorted(self.folder.glob("state-*.safetensors"))
        if not paths:
            raise ValueError(f"{self.folder} holds no training state (state-*.safetensors or model.safetensors)")
        for path in paths:
            file = safe_open(path, "pt")
            self.files.append(file)
            self.keys[id(file)] = set(file.keys())
            if not self.whole:
                for name, (start, stop) in json.loads(file.metadata()[METADATA]).items():
                    self.places[name].append((start, stop, file))
        if self.whole:
            model = self.files[0]
            for name in self.keys[id(model)]:
                shape = model.get_slice(name).get_shape()
                self.places[name].append((0, torch.Size(shape).numel(), model))
        return self

    def __exit__(self, *exception: object) -> None:
        self.files.clear()
        self.places.clear()

    def size(self, name: str) -> int:
        """Number of elements of a parameter; 0 where the checkpoint does not have it."""
        return max((stop for _, stop, _ in self.places.get(name, [])), default=0)

    def check_size(self, name: str, shape: torch.Size) -> None:
        """Raises ValueError where the checkpoint's parameter has another number of elements than `shape`."""
        if self.size(name) != shape.numel():
            raise ValueError(
                f"checkpoint {self.folder} has {self.size(name)} elements of {name}, the model {shape.numel()}: it "
                "belongs to a model of another size"
            )

    def fields(self, name: str) -> list[str]:
        """Names of what is stored for a parameter, apart from the weight."""
        file, separator = (self.files[1], ".") if self.whole else (self.places[name][0][2], SEPARATOR)
        split = (key.rpartition(separator) for key in self.keys[id(file)])
        return [field for owner, _, field in split if owner == name and field != WEIGHT]

    def read(self, name: str, field: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a field of a flattened parameter. ValueError where the checkpoint lacks some."""
        if self.whole:
            file, key = (self.files[0], name) if field == WEIGHT else (self.files[1], f"{name}.{field}")
            if key not in self.keys[id(file)]:
                raise ValueError(f"checkpoint {self.folder} has no {field} of {name}")
            return file.get_tensor(key).flatten()[start:stop]
        parts, filled = None, 0
        for low, high, file in self.places.get(name, []):
            first, last = max(low, start), min(high, stop)
            key = f"{name}{SEPARATOR}{field}"
            if first >= last or key not in self.keys[id(file)]:
                continue
            values = file.get_slice(key)[first - low : last - low]
            if parts is None:
                parts = torch.empty(stop - start, dtype=values.dtype)
            parts[first - start : last - start] = values
            filled += last - first
        if filled != stop - start:
            raise ValueError(
                f"checkpoint {self.folder} has {filled} of the elements {start} to {stop} of {field} of {name}; it "
                "belongs to another model, or a rank's file is missing"
            )
        return parts

    def step(self, name: str) -> Tensor:
        """The number of updates of a parameter, 0-dim float32."""
        if self.whole:
            return self.files[1].get_tensor(f"{name}.step")
        return self.places[name][0][2].get_tensor(f"{name}{SEPARATOR}step")


def consolidated(folder: Path, field: str = "ema") -> dict[str, Tensor]:
    """Every trained parameter of a checkpoint, flattened and whole: its averages, or `field` "param" for the weights.

    A parameter that has no average (it was never updated) gives its weight. Needs no process group and no network.
    Raises ValueError where no parameter has that field.
    """
    with StateReader(folder) as reader:
        stored = {WEIGHT}.union(*(reader.fields(name) for name in reader.places))
        if field not in stored:
            raise ValueError(f"checkpoint {folder} has no '{field}'; it has {', '.join(sorted(stored - {'step'}))}")
        values = {}
        for name in sorted(reader.places):
            use = field if field == WEIGHT or field in reader.fields(name) else WEIGHT
            values[name] = reader.read(name, use, 0, reader.size(name))
        return values


def restore(
    reader: StateReader, optimizer: AdamWEMA, name: str, flat: Tensor, offset: int, start: int, count: int
) -> None:
    """Fills elements of one flat tensor and of its optimizer state from a checkpoint."""
    place = slice(offset, offset + count)
    flat.detach().view(-1)[place] = reader.read(name, WEIGHT, start, start + count).to(flat)
    fields = reader.fields(name)
    if "step" not in fields:
        return
    if not optimizer.state.get(flat):
        optimizer.init_state(flat, torch.zeros((), device=flat.device))
    state = optimizer.state[flat]
    state["step"].copy_(reader.step(name))
    for key in state:
        if key != "step":
            if key not in fields:
                raise ValueError(f"checkpoint {reader.folder} has no {key} of {name}: other optimizer.extra_ema_decays")
            state[key].view(-1)[place] = reader.read(name, key, start, start + count).to(state[key])
