"""Training state by parameter name: pieces of flattened parameters with their moments and averages, from any sharding.

A rank writes the pieces that it owns, [start, stop) of a flattened parameter, into state-RANK.safetensors. Any number
of ranks, under any ZeRO stage or none, reads the pieces that it needs, so a checkpoint does not depend on how it was
sharded. DeepSpeed's universal checkpoint knows only weights and Adam moments and would drop the averages.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
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


def snapshot_pieces(pieces: Iterable[Piece]) -> list[Piece]:
    """Copies on the CPU, so that a thread can write them while training goes on."""
    return [
        replace(p, fields={k: v.detach().to("cpu", copy=True).contiguous() for k, v in p.fields.items()})
        for p in pieces
    ]


def write_pieces(path: Path, pieces: Iterable[Piece], extra: dict[str, Tensor] | None = None) -> None:
    """One rank's file. extra: whole tensors that are not sharded, under their names."""
    pieces = list(pieces)
    tensors = {f"{p.name}{SEPARATOR}{field}": value for p in pieces for field, value in p.fields.items()}
    ranges = {p.name: [p.start, p.stop, p.size] for p in pieces}
    save_file(tensors | (extra or {}), path, {METADATA: json.dumps(ranges, sort_keys=True)})


class StateReader:
    """Reads weights, moments and averages of a checkpoint folder by parameter name, whoever wrote it.

    Use as a context manager: the files stay open inside. share: (rank, world size) of the reader. A file is opened only
    when something is asked that no open one holds, beginning with the reader's own share: with the world size of the
    writers that is one file, so that a thousand ranks do not open a million.
    """

    def __init__(self, folder: Path, share: tuple[int, int] = (0, 1)):
        self.folder = folder
        self.files: list = []
        self.places: dict[str, list[tuple[int, int, object]]] = defaultdict(list)
        """name -> (start, stop, file) of every piece in the open files"""
        self.sizes: dict[str, int] = {}
        self.keys: dict[int, set[str]] = {}
        self.whole = (folder / "model.safetensors").is_file()
        paths = [] if self.whole else sorted(folder.glob("state-*.safetensors"))
        rank, world_size = share
        first, last = rank * len(paths) // world_size, ((rank + 1) * len(paths) - 1) // world_size
        # after the own share what is not sharded, which the first rank holds, then the neighbours
        away = [max(first - i, i - last, 0) for i in range(len(paths))]
        order = sorted(range(len(paths)), key=lambda i: (away[i] > 0, i > 0, away[i]))
        self.unopened = [paths[i] for i in order]

    def __enter__(self) -> "StateReader":
        if self.whole:
            model, _ = (self.open(self.folder / f"{name}.safetensors") for name in ("model", "optimizer"))
            for name in self.keys[id(model)]:
                self.sizes[name] = torch.Size(model.get_slice(name).get_shape()).numel()
                self.places[name].append((0, self.sizes[name], model))
        elif not self.unopened:
            raise ValueError(f"{self.folder} holds no training state (state-*.safetensors or model.safetensors)")
        return self

    def __exit__(self, *exception: object) -> None:
        self.files.clear()
        self.places.clear()

    def open(self, path: Path) -> object:
        file = safe_open(path, "pt")
        self.files.append(file)
        self.keys[id(file)] = set(file.keys())
        return file

    def open_next(self) -> bool:
        """Opens one more rank's file; False where all are open."""
        if not self.unopened:
            return False
        file = self.open(self.unopened.pop(0))
        for name, (start, stop, size) in json.loads(file.metadata()[METADATA]).items():
            self.places[name].append((start, stop, file))
            self.sizes[name] = size
        return True

    def names(self) -> list[str]:
        """All parameters of the checkpoint."""
        while self.open_next():
            pass
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

    def holder(self, name: str) -> object:
        """An open file with a piece of a parameter. ValueError where the checkpoint does not have it."""
        if not self.size(name):
            raise ValueError(f"checkpoint {self.folder} has no parameter {name}; it belongs to another model")
        return self.places[name][0][2]

    def fields(self, name: str) -> list[str]:
        """Names of what is stored for a parameter, apart from the weight."""
        file, separator = (self.files[1], ".") if self.whole else (self.holder(name), SEPARATOR)
        split = (key.rpartition(separator) for key in self.keys[id(file)])
        return [field for owner, _, field in split if owner == name and field != WEIGHT]

    def read(self, name: str, field: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a field of a flattened parameter. ValueError where the checkpoint lacks some."""
        if self.whole:
            file, key = (self.files[0], name) if field == WEIGHT else (self.files[1], f"{name}.{field}")
            if key not in self.keys[id(file)]:
                raise ValueError(f"checkpoint {self.folder} has no {field} of {name}")
            return file.get_tensor(key).flatten()[start:stop]
        key = f"{name}{SEPARATOR}{field}"
        parts, filled, seen = None, 0, 0
        while filled < stop - start:
            for low, high, file in self.places[name][seen:]:
                first, last = max(low, start), min(high, stop)
                if first >= last or key not in self.keys[id(file)]:
                    continue
                values = file.get_slice(key)[first - low : last - low]
                if parts is None:
                    parts = torch.empty(stop - start, dtype=values.dtype)
                parts[first - start : last - start] = values
                filled += last - first
            seen = len(self.places[name])
            if filled < stop - start and not self.open_next():
                raise ValueError(
                    f"checkpoint {self.folder} has {filled} of the elements {start} to {stop} of {field} of {name}; it "
                    "belongs to another model, or a rank's file is missing"
                )
        return parts

    def step(self, name: str) -> Tensor:
        """The number of updates of a parameter, 0-dim float32."""
        if self.whole:
            return self.files[1].get_tensor(f"{name}.step")
        return self.holder(name).get_tensor(f"{name}{SEPARATOR}step")


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
