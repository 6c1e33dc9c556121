"""Training state by parameter name: pieces of flattened parameters with their moments and averages, from any sharding.

A rank writes the pieces that it owns, [start, stop) of a flattened parameter, into state-RANK.safetensors. Any number
of ranks, under any ZeRO stage or none, reads the pieces that it needs, so a checkpoint does not depend on how it was
sharded. DeepSpeed's universal checkpoint knows only weights and Adam moments and would drop the averages.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sfd_fast.files.messages import first_line
from sfd_fast.files.tensors import description_of, write_safetensors
from sfd_fast.training.optimizer import AdamWEMA, WithEMA, init_state

SEPARATOR = "|"
STEP, WEIGHT = "step", "param"
"""the fields of the number of updates and of the fp32 weight itself; the others carry the optimizer's names: exp_avg,
exp_avg_sq, ema, ema_1"""
DTYPES = ("F32", "BF16", "F16", "F64")


@dataclass
class Piece:
    """[start, start + n) of a flattened parameter of `size` elements: views of the weight and its state, all 1-D.

    `step` (0-dim) is the exception: it belongs to the parameter as a whole.
    """

    name: str
    start: int
    size: int
    fields: dict[str, Tensor]

    @property
    def stop(self) -> int:
        return self.start + self.fields[WEIGHT].numel()


def state_file(rank: int) -> str:
    """The name of a rank's file in a checkpoint folder."""
    return f"state-{rank:05d}.safetensors"


def whole_piece(name: str, weight: Tensor, state: dict[str, Tensor]) -> Piece:
    """A parameter that is not sharded, with its optimizer state, as views."""
    tensors = {key: torch.as_tensor(value) for key, value in state.items()}
    fields = {key: value if key == STEP else value.flatten() for key, value in tensors.items()}
    return Piece(name, 0, weight.numel(), {WEIGHT: weight.detach().flatten()} | fields)


def snapshot_pieces(pieces: Iterable[Piece]) -> list[Piece]:
    """Copies on the CPU, so that a thread can write them while training goes on."""
    return [
        replace(p, fields={k: v.detach().to("cpu", copy=True).contiguous() for k, v in p.fields.items()})
        for p in pieces
    ]


def write_pieces(path: Path, pieces: Iterable[Piece]) -> None:
    """One rank's file: tensors NAME|FIELD, and {name: [start, stop, size]} as its description."""
    pieces = list(pieces)
    tensors = {f"{p.name}{SEPARATOR}{field}": value for p in pieces for field, value in p.fields.items()}
    write_safetensors(path, tensors, {p.name: [p.start, p.stop, p.size] for p in pieces})


@dataclass
class Stored:
    """A piece in an open file: [start, stop) of its parameter, and the names of its fields."""

    start: int
    stop: int
    file: object
    fields: set[str]


def stored(file: object) -> dict[str, tuple[int, Stored]]:
    """{name: (number of elements of the parameter, the piece of it)} of an open file; raises where it holds others."""
    ranges, fields = description_of(file), defaultdict(set)
    for key in file.keys():  # noqa: SIM118
        name, _, field = key.rpartition(SEPARATOR)
        start, stop, _ = ranges[name]
        tensor = file.get_slice(key)
        kind, shape = tensor.get_dtype(), tensor.get_shape()
        if kind not in DTYPES or shape != ([] if field == STEP else [stop - start]):
            raise ValueError(f"{field} of {name} from {start} to {stop} has shape {shape} and dtype {kind}")
        fields[name].add(field)
    for name, (start, stop, size) in ranges.items():
        if not (list(map(type, (start, stop, size))) == [int] * 3 and 0 <= start <= stop <= size):
            raise ValueError(f"{name} has elements {start} to {stop} of {size}")
        if WEIGHT not in fields[name] or (len(fields[name]) > 1 and STEP not in fields[name]):
            raise ValueError(f"of {name} there are {', '.join(sorted(fields[name]))}, but no {WEIGHT} or no {STEP}")
    return {name: (size, Stored(start, stop, file, fields[name])) for name, (start, stop, size) in ranges.items()}


class StateReader:
    """Reads weights, moments and averages of a checkpoint folder by parameter name, whoever wrote it.

    Use as a context manager: the files stay open inside. share: (rank, world size) of the reader. A file is opened only
    when something is asked that no open one holds, beginning with the reader's own share: with the world size of the
    writers that is one file, so that a thousand ranks do not open a million.
    """

    def __init__(self, folder: Path, share: tuple[int, int] = (0, 1)):
        self.folder = folder
        self.places: dict[str, list[Stored]] = defaultdict(list)
        """by name every piece in the open files"""
        self.sizes: dict[str, int] = {}
        paths = sorted(folder.glob("state-*.safetensors"))
        rank, world_size = share
        first, last = rank * len(paths) // world_size, ((rank + 1) * len(paths) - 1) // world_size
        # after the own share what is not sharded, which the first rank holds, then the neighbours
        away = [max(first - i, i - last, 0) for i in range(len(paths))]
        order = sorted(range(len(paths)), key=lambda i: (away[i] > 0, i > 0, away[i]))
        self.unopened = [paths[i] for i in order]

    def __enter__(self) -> "StateReader":
        if not self.unopened:
            raise ValueError(f"{self.folder} holds no training state (state-*.safetensors)")
        return self

    def __exit__(self, *exception: object) -> None:
        self.places.clear()

    def open_next(self) -> bool:
        """Opens one more rank's file; False where all are open. ValueError where it is no part of a checkpoint."""
        if not self.unopened:
            return False
        path = self.unopened.pop(0)
        from safetensors import SafetensorError, safe_open  # here: engines are measured where only torch is installed

        try:
            file = safe_open(path, "pt")
            found = stored(file)
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise ValueError(f"{path} is damaged or no part of a checkpoint: {first_line(error)}") from None
        for name, (size, piece) in found.items():
            if self.sizes.setdefault(name, size) != size:
                raise ValueError(f"{path} has {name} of {size} elements, another rank's file of {self.sizes[name]}")
            self.places[name].append(piece)
        return True

    def names(self) -> list[str]:
        """All parameters of the checkpoint. ValueError where a part of one is missing."""
        while self.open_next():
            pass
        for name, pieces in self.places.items():
            have = sum(piece.stop - piece.start for piece in pieces)
            if have != self.sizes[name]:
                raise ValueError(f"checkpoint {self.folder} has {have} of {self.sizes[name]} elements of {name}")
        return sorted(self.places)

    def size(self, name: str) -> int:
        """Number of elements of a parameter; 0 where the checkpoint does not have it."""
        while name not in self.sizes and self.open_next():
            pass
        return self.sizes.get(name, 0)

    def check_size(self, name: str, shape: torch.Size) -> None:
        """Raises ValueError where the checkpoint's parameter has another number of elements than `shape`."""
        if self.size(name) != shape.numel():
            raise ValueError(
                f"checkpoint {self.folder} has {self.size(name)} elements of {name}, the model {shape.numel()}: it "
                "belongs to a model of another size"
            )

    def holder(self, name: str) -> Stored:
        """A piece of a parameter. ValueError where the checkpoint does not have it."""
        if not self.size(name):
            raise ValueError(f"checkpoint {self.folder} has no parameter {name}; it belongs to another model")
        return self.places[name][0]

    def fields(self, name: str) -> set[str]:
        """Names of what is stored for a parameter, apart from the weight."""
        return self.holder(name).fields - {WEIGHT}

    def read(self, name: str, field: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a field of a flattened parameter. ValueError where the checkpoint lacks some."""
        values, filled, seen = None, 0, 0
        while filled < stop - start:
            for piece in self.places[name][seen:]:
                first, last = max(piece.start, start), min(piece.stop, stop)
                if first >= last or field not in piece.fields:
                    continue
                part = piece.file.get_slice(f"{name}{SEPARATOR}{field}")[first - piece.start : last - piece.start]
                if values is None:
                    values = torch.empty(stop - start, dtype=part.dtype)
                values[first - start : last - start] = part
                filled += last - first
            seen = len(self.places[name])
            if filled < stop - start and not self.open_next():
                raise ValueError(
                    f"checkpoint {self.folder} has {filled} of the elements {start} to {stop} of {field} of {name}; it "
                    "belongs to another model, or a rank's file is missing"
                )
        return values

    def step(self, name: str) -> Tensor:
        """The number of updates of a parameter, 0-dim float32."""
        return self.holder(name).file.get_tensor(f"{name}{SEPARATOR}{STEP}")


def consolidated(folder: Path, field: str = "ema") -> dict[str, Tensor]:
    """Every trained parameter of a checkpoint, flattened and whole: its averages, or `field` "param" for the weights.

    A parameter that has no average (it was never updated) gives its weight. Needs no process group and no network.
    Raises ValueError where no parameter has that field.
    """
    with StateReader(folder) as reader:
        names = reader.names()
        stored = {WEIGHT}.union(*(reader.fields(name) for name in names))
        if field not in stored:
            raise ValueError(f"checkpoint {folder} has no '{field}'; it has {', '.join(sorted(stored - {'step'}))}")
        values = {}
        for name in names:
            use = field if field == WEIGHT or field in reader.fields(name) else WEIGHT
            values[name] = reader.read(name, use, 0, reader.size(name))
        return values


def restore(
    reader: StateReader, optimizer: AdamWEMA | WithEMA, name: str, flat: Tensor, offset: int, start: int, count: int
) -> None:
    """Fills elements of one flat tensor and of its optimizer state from a checkpoint."""
    place = slice(offset, offset + count)
    flat.detach().view(-1)[place] = reader.read(name, WEIGHT, start, start + count).to(flat)
    fields = reader.fields(name)
    if STEP not in fields:
        return
    if not optimizer.state.get(flat):
        init_state(optimizer, flat, torch.zeros((), device=flat.device))
    state = optimizer.state[flat]
    state[STEP].copy_(reader.step(name))
    for key in state:
        if key != STEP:
            if key not in fields:
                raise ValueError(f"checkpoint {reader.folder} has no {key} of {name}: other optimizer.extra_ema_decays")
            state[key].view(-1)[place] = reader.read(name, key, start, start + count).to(state[key])
