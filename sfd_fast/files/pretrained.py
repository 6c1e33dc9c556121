"""Networks that transformers or diffusers saved: complete, finite, of a plausible size, or refused in one line."""

import contextlib
import importlib
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
NEVER_READ = ("mask_token", "position_ids")
"""what only training reads, and what old files hold needlessly"""


def load_pretrained(kind: type, source: object, **options: Any) -> nn.Module:
    """kind.from_pretrained(source), float32, in eval mode, with every weight from the file and no code from there.

    kind: a class of transformers or diffusers. A library would fill what is missing or of another shape with random
    numbers. Raises ValueError in one line for a source that cannot be loaded, and for weights that are missing, that
    belong to further layers, are of another shape, NaN or infinite.
    """
    read_config(source)
    try:
        with quiet(kind), float32_by_default():
            model, loaded = kind.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except Exception as error:  # the libraries raise many kinds, also for a damaged file and a network that is down
        raise ValueError(f"{source}: its {kind.__name__} cannot be loaded: {first_line(error)}") from error
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


def read_config(source: object) -> dict[str, Any]:
    """config.json of a folder or of a model on the Hugging Face hub.

    Raises ValueError in one line where it cannot be read, or describes what would take minutes or all memory to build.
    """
    path = Path(str(source), "config.json")
    try:
        if not path.parent.is_dir():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(source), "config.json"))
        config = read_json(path)
    except Exception as error:  # the hub client raises many kinds: no network, no such model, no permission
        hint = "" if Path(str(source)).is_dir() else "; give the folder of a downloaded copy"
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
def quiet(kind: type) -> Iterator[None]:
    """Without the library's own report of missing weights: load_pretrained has one line for it."""
    logging = importlib.import_module(f"{kind.__module__.split('.')[0]}.utils.logging")
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
