"""Networks that transformers or diffusers saved: complete, finite, of a plausible size, or refused in one line."""

import contextlib
import importlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sfd_fast.files.documents import read_json
from sfd_fast.files.messages import first_line
from sfd_fast.files.tensors import float32_by_default, require_finite

LARGEST = 2**20
"""the largest whole number in a configuration that is believed; a width or a count of anything is smaller"""
MOST_LAYERS = 1000
log = logging.getLogger(__name__)
NEVER_READ = ("mask_token", "position_ids")
"""what only training reads, and what old files hold needlessly"""


def load_pretrained(kind: type, source: object, *, setting: str = "", **options: Any) -> nn.Module:
    """kind.from_pretrained(source), float32, in eval mode, with every weight from the file and no code from there.

    kind: a class of transformers or diffusers. setting: what named the source, for the message. A library would fill
    what is missing or of another shape with random numbers. Raises ValueError in one line for a source that cannot be
    loaded, and for weights that are missing, that belong to further layers, are of another shape, NaN or infinite.
    """
    read_config(source, setting)
    try:
        with quiet(kind.__module__.split(".")[0]), quiet("huggingface_hub"), float32_by_default():
            model, loaded = kind.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except Exception as error:  # the libraries raise many kinds, also for a damaged file and a network that is down
        hint = remedy(source, setting)
        raise ValueError(f"{source}: its {kind.__name__} cannot be loaded: {first_line(error)}{hint}") from error
    parts = {name.split(".")[0] for name in model.state_dict()}  # a decoder or a text tower is not asked for
    problems = {
        "lacks": loaded["missing_keys"],
        "has in another shape": [key[0] if isinstance(key, tuple) else key for key in loaded["mismatched_keys"]],
        "has beyond its config": [key for key in loaded["unexpected_keys"] if key.split(".")[0] in parts],
    }
    for problem, keys in problems.items():
        keys = sorted(key for key in keys if not key.endswith(NEVER_READ))
        if keys:
            raise ValueError(
                f"{source} {problem} {len(keys)} weights of its {type(model).__name__}, the first is '{keys[0]}': the "
                "file is incomplete, or its config is another network's"
            )
    require_finite(model.state_dict(), source)
    return model.float().eval()


def remedy(source: object, setting: str) -> str:
    """What to do where a model of the hub cannot be had; nothing for a folder."""
    if Path(str(source)).is_dir():
        return ""
    return f"; without a network give the folder of a downloaded copy{f': {setting} FOLDER' if setting else ''}"


def read_config(source: object, setting: str = "") -> dict[str, Any]:
    """config.json of a folder or of a model on the Hugging Face hub.

    Raises ValueError in one line where it cannot be read, or describes what would take minutes or all memory to build.
    """
    path = Path(str(source), "config.json")
    try:
        if not path.parent.is_dir():
            from huggingface_hub import hf_hub_download

            log.info("%s: asking the Hugging Face hub", source)
            with quiet("huggingface_hub"):
                path = Path(hf_hub_download(str(source), "config.json"))
        config = read_json(path)
    except Exception as error:  # the hub client raises many kinds: no network, no such model, no permission
        hint = remedy(source, setting)
        raise ValueError(f"{source}: its config.json cannot be read: {first_line(error)}{hint}") from error
    require_plausible(config, source)
    return config


def require_plausible(config: Mapping[str, Any], source: object) -> None:
    """Raises ValueError for numbers and lists that no network of these kinds has."""
    for key, value in config.items():
        numbers = value if isinstance(value, list | tuple) else [value]
        if len(numbers) > MOST_LAYERS:
            raise ValueError(f"{source}: the config's {key} has {len(numbers)} entries; no network here has as many")
        for number in numbers:
            if isinstance(number, Mapping):
                require_plausible(number, source)
            limit = MOST_LAYERS if "layers" in str(key) else LARGEST
            if isinstance(number, int) and abs(number) > limit:
                raise ValueError(f"{source}: the config says {key} = {number}; at most {limit} is plausible")


@contextlib.contextmanager
def quiet(library: str) -> Iterator[None]:
    """Without a library's own reports, of missing weights or of a network that is down: we have one line for each."""
    reports = importlib.import_module(f"{library}.utils.logging")
    before = reports.get_verbosity()
    reports.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        reports.set_verbosity(before)
