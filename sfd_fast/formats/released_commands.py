"""Released YAML files where a command takes --config: told by their keys, and turned into that command's settings."""

from collections.abc import Mapping
from typing import Any

from sfd_fast.config import to_dict
from sfd_fast.formats.released_config import read_config, sample_settings
from sfd_fast.formats.released_semvae import read_training_config

DIFFUSION, SEMVAE, TOKENIZER = "diffusion training and sampling", "SemVAE's training", "a tokenizer"
COMMANDS = {"train": DIFFUSION, "sample": DIFFUSION, "train-semvae": SEMVAE}
"""commands that take a released file, and of which kind"""


def released_kind(tree: object) -> str | None:
    """What a released YAML tree is for, or None for any other tree."""
    model = tree.get("model") if isinstance(tree, Mapping) else None
    if not isinstance(model, Mapping):
        return None
    params = model.get("params")
    if "target" in model or "ddconfig" in model or (isinstance(params, Mapping) and "ddconfig" in params):
        return TOKENIZER
    if "arch" in model:
        return SEMVAE
    return DIFFUSION if "model_type" in model else None


def settings_for(command: str, tree: Mapping[str, Any], source: object) -> tuple[dict[str, Any], list[str]]:
    """The command's own settings from a released tree, and the released settings without a counterpart.

    source: the file, for messages. Raises ValueError where the file is for another command, and for settings that this
    system would compute otherwise.
    """
    kind = released_kind(tree)
    if kind == TOKENIZER:
        raise ValueError(
            f"{source} describes a tokenizer of the released system, which needs no settings here: a texture codec is "
            "read from its weights (--texture_codec, or `sfd convert`)"
        )
    if COMMANDS.get(command) != kind:
        others = " or ".join(f"`sfd {name}`" for name, use in COMMANDS.items() if use == kind)
        raise ValueError(f"{source} is a released configuration for {kind}: use it with {others}, not `sfd {command}`")
    try:
        if command == "sample":
            return sample_settings(tree)
        config, ignored = read_training_config(tree) if kind == SEMVAE else read_config(tree)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return to_dict(config), ignored
