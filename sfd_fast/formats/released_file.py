"""Files of the released system: torch files read without running anything pickled in them, and written back.

A file is read as a tree of plain data (dict, OrderedDict, list, tuple, numbers, strings, None) with tensors as leaves;
pickled OmegaConf objects become `PickledConfig` dictionaries. The tree can be kept in a safetensors file (`pack_tree`).
"""

import json
import pickle
import re
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sfd_fast.files.atomic import write_atomically
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
# not know is refused. OmegaConf: config of the released trainer; Lightning: callback states in LDM's .ckpt files.
STAND_INS: dict[str, Callable] = {
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


def read_torch_file(path: str | Path) -> object:
    """The content of a .pt or .ckpt file as plain data and tensors (memory-mapped where the format allows).

    Nothing pickled is executed: torch's weights-only reader, with inert stand-ins for the classes of STAND_INS.
    Raises FileNotFoundError; ValueError for a truncated file and for one that holds foreign objects or code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    allowed = [(stand_in, name) for name, stand_in in STAND_INS.items()]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return _plain(content)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|function|class|global) ([\w.<> ]+?)(?: was| whose|$|\n)", str(error))
        what = f"'{refused[1]}'" if refused and "nsupported" in str(error) else "an object that is no plain data"
        raise ValueError(
            f"checkpoint {path} is refused: it asks to load {what}, which could run foreign code. Expected are "
            "tensors, plain data and OmegaConf settings; nothing in the file was executed"
        ) from None
    except RecursionError:
        raise ValueError(f"checkpoint {path} is refused: its content refers to itself without end") from None
    except (RuntimeError, EOFError, OSError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"checkpoint {path} is truncated or damaged: {first_line(error)}") from None


def _plain(value: object) -> object:
    """Replaces OmegaConf stand-ins by their content; an interpolation stays the string that it is."""
    if isinstance(value, DictStandIn):
        content = value._content
        return PickledConfig(_bare(value)) if isinstance(content, dict) else content
    if isinstance(value, ListStandIn):
        return _bare(value)
    if isinstance(value, OrderedDict):
        ordered = OrderedDict((key, _plain(item)) for key, item in value.items())
        ordered.__dict__.update(value.__dict__)
        return ordered
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _bare(node: object) -> object:
    if isinstance(node, NodeStandIn):
        return node._val
    if isinstance(node, DictStandIn) and isinstance(node._content, dict):
        return {key: _bare(item) for key, item in node._content.items()}
    if isinstance(node, ListStandIn) and isinstance(node._content, list):
        return [_bare(item) for item in node._content]
    return node._content if isinstance(node, DictStandIn | ListStandIn) else node


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


def pack_tree(tree: object, known: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """A tree as JSON text and the tensors that it needs; `known` tensors (name -> tensor) are referred to by name.

    Raises ValueError for leaves that are neither plain data nor tensors.
    """
    names = {id(tensor): name for name, tensor in known.items()}
    tensors: dict[str, Tensor] = {}

    def pack(value: object, path: str) -> object:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            if id(value) in names:
                return {"weights": names[id(value)]}
            tensors[path] = value
            return {"tensor": path}
        if isinstance(value, list):
            return [pack(item, f"{path}/{i}") for i, item in enumerate(value)]
        if isinstance(value, tuple):
            return {"tuple": [pack(item, f"{path}/{i}") for i, item in enumerate(value)]}
        if isinstance(value, dict):
            kinds = {PickledConfig: "omegaconf", OrderedDict: "ordered"}
            items = [[pack(key, path), pack(item, f"{path}/{key}")] for key, item in value.items()]
            packed = {kinds.get(type(value), "dict"): items}
            if getattr(value, "__dict__", None):
                packed["attributes"] = pack(value.__dict__, f"{path}@")
            return packed
        raise ValueError(
            f"'{path.lstrip('/')}' is a {type(value).__name__}: only plain data and tensors can be kept; "
            "convert with keep_training_state=False to leave out all but the weights and the config"
        )

    return json.dumps(pack(tree, "")), tensors


def unpack_tree(text: str, tensors: dict[str, Tensor], known: dict[str, Tensor]) -> object:
    """The inverse of pack_tree."""

    def unpack(value: object) -> object:
        if isinstance(value, list):
            return [unpack(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "weights" in value:
            return known[value["weights"]]
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "tuple" in value:
            return tuple(unpack(item) for item in value["tuple"])
        for name, kind in (("omegaconf", PickledConfig), ("ordered", OrderedDict), ("dict", dict)):
            if name in value:
                built = kind((unpack(key), unpack(item)) for key, item in value[name])
                if "attributes" in value:
                    built.__dict__.update(unpack(value["attributes"]))
                return built
        raise ValueError(f"damaged tree: {str(value)[:80]}")

    return unpack(json.loads(text))


def state_dict_of(tree: object, weights: str = "ema") -> dict[str, Tensor]:
    """The network's weights in a released file, names without `module.` (DDP) and `_orig_mod.` (torch.compile).

    weights: "ema" or "model" where the file has both; also files of SemVAE ("model_state_dict"), LDM ("state_dict") and
    bare state dicts.
    Raises ValueError where the file has no weights of that kind.
    """
    if not isinstance(tree, dict):
        raise ValueError(f"a checkpoint is a dictionary; this file holds a {type(tree).__name__}")
    if weights not in ("ema", "model"):
        raise ValueError(f"weights '{weights}' is unknown; allowed: ema, model")
    for key in (weights, "model_state_dict", "state_dict"):
        if isinstance(tree.get(key), dict):
            found = tree[key]
            break
    else:
        if not tree or not all(isinstance(value, Tensor) for value in tree.values()):
            raise ValueError(f"the file has no '{weights}' weights; its entries are: {', '.join(map(str, tree))}")
        found = tree
    for key, value in found.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"weights entry '{key}' is a {type(value).__name__}, not a tensor")
    return {key.removeprefix("module.").replace("_orig_mod.", ""): value for key, value in found.items()}
