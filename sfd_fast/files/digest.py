"""Digests: of a file, of tensors, of settings. SHA-256 throughout, hexadecimal."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sfd_fast.files.home import with_home


@with_home
def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, in the order of the names: equal tensors, wherever stored."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def module_digest(module: nn.Module) -> str:
    """Of all parameters and buffers; a module that has none is told by its kind and its numbers instead."""
    tensors = module.state_dict()
    if tensors:
        return tensors_digest(tensors)
    numbers = {name: value for name, value in vars(module).items() if type(value) in (int, float, str)}
    return settings_digest({"kind": type(module).__name__} | numbers)


def settings_digest(settings: Mapping) -> str:
    """SHA-256 of settings as sorted JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
