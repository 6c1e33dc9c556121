"""Torch files (.pt, .ckpt, .pth) read without running anything that is pickled in them, and written back.

A file is read as a tree of plain data (dict, OrderedDict, list, tuple, numbers, strings, None) with tensors as leaves;
NumPy arrays become tensors, pickled OmegaConf objects `PickledConfig` dictionaries, a scikit-learn PCA its attributes.
"""

import pickle
import re
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfd_fast.files.atomic import write_atomically
from sfd_fast.files.home import with_home
from sfd_fast.files.messages import first_line


class PickledConfig(dict):
    """Plain content of an OmegaConf dictionary that a released checkpoint carries; written back as OmegaConf."""


class StandIn:
    """Takes the place of a pickled class: keeps the state as plain attributes and runs none of the class's code."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class DictStandIn(StandIn):
    pass


class ListStandIn(StandIn):
    pass


class NodeStandIn(StandIn):
    pass


# Full name of a pickled global -> what is put there instead. Everything else that torch's own weights-only reader does
# not know is refused. OmegaConf: config of the released trainer; Lightning: callback states in LDM's .ckpt files; NumPy
# and scikit-learn: the authors' PCA of features.
STAND_INS: dict[str, Callable] = {
    **{f"numpy.{core}.multiarray._reconstruct": np.empty(0).__reduce__()[0] for core in ("core", "_core")},
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    **{f"numpy.dtypes.{kind}DType": getattr(np.dtypes, f"{kind}DType") for kind in ("Float32", "Float64", "Int64")},
    **{f"sklearn.decomposition.{module}.PCA": StandIn for module in ("_pca", "pca")},
    "omegaconf.dictconfig.DictConfig": DictStandIn,
    "omegaconf.listconfig.ListConfig": ListStandIn,
    "omegaconf.base.ContainerMetadata": StandIn,
    "omegaconf.base.Metadata": StandIn,
    **{f"omegaconf.nodes.{kind}Node": NodeStandIn for kind in ("Any", "String", "Integer", "Float", "Boolean")},
    "typing.Any": StandIn,
    "typing.Union": StandIn,
    "collections.defaultdict": defaultdict,
    **{f"builtins.{kind.__name__}": kind for kind in (dict, list, tuple, int, float, str, bool)},
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": StandIn,
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint": StandIn,
}


@with_home
def read_torch_file(path: str | Path) -> object:
    """The content of a torch file as plain data and tensors (memory-mapped where the format allows).

    Nothing pickled is executed: torch's weights-only reader, with inert stand-ins for the classes of STAND_INS.
    Raises FileNotFoundError; ValueError in one line for a truncated file, for foreign objects or code, and for content
    that would unfold to more than the file holds.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    allowed = [(stand_in, name) for name, stand_in in STAND_INS.items()]
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            require_stored(path)
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        return Reading().plain(content)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|function|class|global) ([\w.<> ]+?)(?: was| whose|$|\n)", str(error))
        what = f"'{refused[1]}'" if refused and "nsupported" in str(error) else "an object that is no plain data"
        raise ValueError(
            f"checkpoint {path} is refused: it asks to load {what}, which could run foreign code. Expected are "
            "tensors, plain data and OmegaConf settings; nothing in the file was executed"
        ) from None
    except Refused as error:
        raise ValueError(f"checkpoint {path} is refused: {error}") from None
    except RecursionError:
        raise ValueError(f"checkpoint {path} is refused: its content is nested too deeply") from None
    except Exception as error:  # torch, pickle and zipfile raise many kinds for damaged files
        raise ValueError(f"checkpoint {path} is truncated or damaged: {first_line(error)}") from None


class Refused(Exception):
    """Why a file is not read."""


def require_stored(path: Path) -> None:
    """Refuses an archive with compressed entries: torch writes none, and they may unfold a thousandfold."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise Refused(f"its entry {entry.filename[:80]!r} is compressed, which torch never does")


class Reading:
    """One tree on its way to plain data: stand-ins give way to their content, an interpolation stays text, and what
    stands in the tree several times is converted once.
    """

    def __init__(self) -> None:
        self.done: dict[tuple[int, bool], object] = {}
        self.open: set[tuple[int, bool]] = set()

    def plain(self, value: object, inside: bool = False) -> object:
        """inside: of OmegaConf settings, whose nested dictionaries are plain ones."""
        if isinstance(value, NodeStandIn):
            return self.plain(value._val, inside)
        if isinstance(value, Tensor):
            require_backed(value)
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "fiub":
                raise Refused(f"it holds an array of {value.dtype}, not of numbers")
            return torch.from_numpy(np.array(value))
        if not isinstance(value, dict | list | tuple | StandIn):
            return value
        key = (id(value), inside)
        if key in self.open:
            raise Refused("its content refers to itself without end")
        if key not in self.done:
            self.open.add(key)
            self.done[key] = self.converted(value, inside)
            self.open.remove(key)
        return self.done[key]

    def converted(self, value: dict | list | tuple | StandIn, inside: bool) -> object:
        if isinstance(value, DictStandIn | ListStandIn):
            content = self.plain(value._content, True)
            return PickledConfig(content) if isinstance(content, dict) and not inside else content
        if isinstance(value, StandIn):
            return self.plain(vars(value))
        if isinstance(value, OrderedDict):
            ordered = OrderedDict((key, self.plain(item, inside)) for key, item in value.items())
            ordered.__dict__.update(value.__dict__)
            return ordered
        if isinstance(value, dict):
            return {key: self.plain(item, inside) for key, item in value.items()}
        return type(value)(self.plain(item, inside) for item in value)


def require_backed(tensor: Tensor) -> None:
    """Refuses a tensor that stands for more numbers than the file holds: strides of 0 make one number a billion."""
    if tensor.layout != torch.strided or tensor.is_meta:
        raise Refused("it holds a sparse tensor or one without data")
    size = tensor.numel() * tensor.element_size()
    if size > max(tensor.untyped_storage().nbytes(), 2**20):
        raise Refused(f"a tensor of shape {tuple(tensor.shape)} stands for more numbers than the file holds")


@with_home
def write_torch_file(path: str | Path, tree: object) -> None:
    """Writes such a tree as a torch file that the released code loads, OmegaConf settings as OmegaConf; atomic."""
    path = Path(path)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # a file object: torch would store the temporary name otherwise
            torch.save(_with_omegaconf(tree), file)

    write_atomically(path, write)


def _with_omegaconf(value: object) -> object:
    if isinstance(value, PickledConfig):
        from omegaconf import OmegaConf

        return OmegaConf.create(dict(value))
    if isinstance(value, OrderedDict):
        ordered = OrderedDict((key, _with_omegaconf(item)) for key, item in value.items())
        ordered.__dict__.update(value.__dict__)
        return ordered
    if isinstance(value, dict):
        return {key: _with_omegaconf(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_omegaconf(item) for item in value)
    return value
