"""Trees of released checkpoints: the weights in them, and all of a tree in a safetensors file and back."""

import json
import re
from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor

from sfd_fast.config.checks import one_of
from sfd_fast.files.torch_file import PickledConfig

MAX_VALUES = 500_000
"""in a tree; one with the optimizer's state of XXL has some ten thousand"""
LEAVE_OUT = "convert with keep_training_state=False to leave out all but the weights and the config"


def pack_tree(tree: object, known: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """A tree as JSON text and the tensors that it needs; `known` tensors (name -> tensor) are referred to by name.

    Raises ValueError for leaves that are neither plain data nor tensors.
    """
    names = {id(tensor): name for name, tensor in known.items()}
    tensors: dict[str, Tensor] = {}
    count = 0

    def pack(value: object, path: str) -> object:
        nonlocal count
        count += 1
        if count > MAX_VALUES:
            raise ValueError(f"the file holds more than {MAX_VALUES} values beside its weights; {LEAVE_OUT}")
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
            f"'{path.lstrip('/')}' is a {type(value).__name__}: only plain data and tensors can be kept; {LEAVE_OUT}"
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
    one_of("weights", weights, ("ema", "model"))
    for key in (weights, "model_state_dict", "state_dict"):
        if isinstance(tree.get(key), dict):
            found = tree[key]
            break
    else:
        if not tree or not all(isinstance(value, Tensor) for value in tree.values()):
            entries = ", ".join(str(key)[:40] for key in list(tree)[:20])
            raise ValueError(f"the file has no '{weights}' weights; its entries are: {entries}")
        found = tree
    return without_wrappers(found)


def without_wrappers(tensors: Mapping[object, object]) -> dict[str, Tensor]:
    """Weights under the network's own names: wrappers put `module.` and `_orig_mod.` before them, in any order.

    Raises ValueError for entries that are no named tensors, and for two that have the same name.
    """
    named: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"weights entry {str(key)[:80]!r} is a {type(value).__name__}, not a tensor with a name")
        name = re.sub(r"^(?:module\.|_orig_mod\.)+", "", key).replace("_orig_mod.", "")
        if name in named:
            raise ValueError(f"two weights are called '{name}' once `module.` and `_orig_mod.` are taken off")
        named[name] = value
    return named
