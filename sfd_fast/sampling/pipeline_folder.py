"""A pipeline as a folder (pipeline.json, transformer, guide, texture_codec, statistics), and what must fit together."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from torch import nn

from sfd_fast.config import GuidanceConfig, ModelConfig, SamplerConfig, SFDConfig, from_dict, require, to_dict
from sfd_fast.config.checks import Count, NotNegative, Positive, Settings
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.files.digest import settings_digest
from sfd_fast.files.documents import read_json
from sfd_fast.files.home import with_home
from sfd_fast.formats.marked_folder import PIPELINE as INDEX
from sfd_fast.formats.marked_folder import WEIGHTS, check_files, replace_marked
from sfd_fast.formats.model_folder import read_config, read_description, read_statistics, save_model
from sfd_fast.formats.released_model import load_model
from sfd_fast.formats.texture import load_codec, save_codec

RUN_MODEL, CHECKPOINTS, CHECKPOINT_STATE = "model", "checkpoints", "state.json"
"""parts of a run directory, which stands for its model"""
DIGEST = "digest"
ID2LABEL = "id2label"
"""names of the classes, in pipeline.json and in a network's card: people may write them anew"""


@dataclass(frozen=True)
class PipelineSettings(Settings):
    """What pipeline.json holds beside the names of classes; it marks a folder as a pipeline. People may add keys."""

    delta_t: NotNegative
    micro_batch_size: Count
    sampler: SamplerConfig
    guidance: GuidanceConfig
    latent_multiplier: Positive
    classes: tuple[int, ...] | None = None
    """those that the model has seen in training; None: all"""


def save_parts(
    folder: Path,
    transformer: nn.Module,
    guide: nn.Module | None,
    texture_codec: nn.Module,
    statistics: LatentStatistics,
    training: SFDConfig | None,
    settings: PipelineSettings,
    id2label: Mapping[int, str] | None = None,
    notes: Mapping[str, object] | None = None,
) -> None:
    """Writes a pipeline's folder, in one step. notes: further keys of its pipeline.json, which loading does not read.

    Raises ValueError where something that is not ours lies there, OSError where the place cannot be written.
    """

    def write(temporary: Path) -> None:
        save_model(temporary / "transformer", transformer, config=training, statistics=statistics)
        if guide is not None:
            save_model(temporary / "guide", guide, statistics=statistics)
        save_codec(temporary / "texture_codec", texture_codec)
        (temporary / "statistics").mkdir()
        statistics.save(temporary / "statistics")
        content = to_dict(settings)
        named = {} if id2label is None else {ID2LABEL: {str(number): name for number, name in id2label.items()}}
        whole = {**(notes or {}), **content, DIGEST: settings_digest(content), **named}
        (temporary / INDEX).write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")

    replace_marked(folder, "pipeline", write)


def read_settings(path: Path) -> PipelineSettings:
    """The settings in a pipeline.json. Raises ValueError of one line with the file's name where it is damaged."""
    content = read_json(path)
    ours = {field.name: content[field.name] for field in fields(PipelineSettings) if field.name in content}
    try:
        settings = from_dict(PipelineSettings, ours)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    require(
        content.get(DIGEST, settings_digest(ours)) == settings_digest(ours),
        f"{path} is damaged or was edited: its settings are not those that were written; copy it again, or remove its "
        f"'{DIGEST}' to use them as they are",
    )
    return settings


def folder_of_model(path: Path) -> Path:
    """A pipeline's or network's folder, or the one in a run directory. Raises ValueError for anything else."""
    for folder in (path, path / RUN_MODEL):
        if (folder / INDEX).is_file() or (folder / WEIGHTS).is_file():
            return folder
    if path.is_file():
        what, mend = "a file", f"make a folder of a released one: sfd convert --source {path} --target FOLDER"
    elif (path / CHECKPOINT_STATE).is_file() or (path / CHECKPOINTS).is_dir() or path.name == CHECKPOINTS:
        what, mend = "a training checkpoint", f"make a model of it: sfd convert --source {path} --target FOLDER"
    else:
        what, mend = "no model", f"a pipeline has {INDEX}, a network {WEIGHTS}, a run directory {RUN_MODEL}/{WEIGHTS}"
    raise ValueError(f"{path} is {what}, not the folder of a pipeline or a network: {mend}")


@with_home
def load_parts(
    folder: Path,
    guide: str | Path | None,
    texture_codec: str | Path | nn.Module | None,
    statistics: LatentStatistics | None,
) -> dict:
    """Arguments of SFDPipeline from files; raises as from_pretrained."""
    parts: dict = {}
    if (folder / INDEX).is_file():
        check_files(folder)
        settings = read_settings(folder / INDEX)
        for name in ("delta_t", "micro_batch_size", "sampler", "guidance", "classes"):
            parts[name] = getattr(settings, name)
        parts[ID2LABEL] = read_json(folder / INDEX).get(ID2LABEL)
        statistics = statistics or LatentStatistics.load(folder / "statistics", settings.latent_multiplier)
        model_folder = folder / "transformer"
        guide = guide or ((folder / "guide") if (folder / "guide").is_dir() else None)
        texture_codec = texture_codec or folder / "texture_codec"
        with contextlib.suppress(ValueError):  # saved without the config of its training
            parts["training"] = read_config(model_folder)
    else:
        model_folder = folder
        parts["training"] = training = read_config(model_folder)
        card = read_description(model_folder)[1].get("card", {})
        parts["delta_t"], parts["classes"], parts[ID2LABEL] = (
            training.transport.delta_t, card.get("classes"), card.get(ID2LABEL),
        )  # fmt: skip
        # The released grid stays on request: its dopri5 lets an image depend on its batch (docs/METHOD.md 5).
        parts["sampler"], parts["guidance"] = replace(training.sampler, grid="exact"), training.guidance
        statistics = statistics or read_statistics(model_folder)
        texture_codec = texture_codec or training.data.texture_codec or card.get("texture_codec")
    if guide is not None and Path(guide).is_dir():
        guide = folder_of_model(Path(guide))
    require(
        statistics is not None,
        f"{folder} holds no statistics of its latents: give those of the training cache as statistics="
        "LatentStatistics.load(CACHE)",
    )
    require(
        texture_codec is not None,
        f"{folder} names no texture codec: give its folder or file as texture_codec=... (--texture_codec)",
    )
    parts["statistics"] = statistics
    check_multiplier(statistics, parts.get("training"), model_folder)
    for name, place, what in (("transformer", model_folder, "model"), ("guide", guide, "guide")):
        if place is not None:
            parts[name] = load_model(place)
            recorded = read_statistics(place) if Path(place).is_dir() else None
            check_statistics(statistics, recorded, f"the {what} in {place}")
    parts["texture_codec"] = texture_codec if isinstance(texture_codec, nn.Module) else load_codec(texture_codec)
    return parts


def check_statistics(statistics: LatentStatistics, recorded: LatentStatistics | None, name: str) -> None:
    """Raises ValueError where a network was trained on latents with other statistics than the given ones.

    Decoding with another cache's statistics, or a guide of another cache, costs several FID points (docs/METHOD.md 2).
    """
    if recorded is not None and recorded.digest() != statistics.digest():
        raise ValueError(
            f"statistics of another data set: those given have the fingerprint {statistics.digest()}, {name} was "
            f"trained on latents with {recorded.digest()}; use the statistics (and a guide) of the same cache"
        )


def check_multiplier(statistics: LatentStatistics, training: SFDConfig | None, model_folder: Path) -> None:
    """Raises ValueError where latents would be divided by another multiplier than they were multiplied by."""
    trained = statistics.multiplier if training is None else training.data.latent_multiplier
    if trained != statistics.multiplier:
        raise ValueError(
            f"latent multiplier {statistics.multiplier} is given, but the model in {model_folder} was trained on "
            f"latents times {trained}: give that one with the statistics (docs/METHOD.md 2)"
        )


def check_parts(
    model: ModelConfig,
    statistics: LatentStatistics,
    texture_codec: nn.Module,
    delta_t: float,
    guide: ModelConfig | None,
) -> None:
    """Raises ValueError where model, statistics, codec and guide are not of one system."""
    require(
        (delta_t > 0) == model.two_clocks,
        f"delta_t is {delta_t} but the model was built with {'two clocks' if model.two_clocks else 'one clock'}: two "
        "clocks need delta_t > 0, and delta_t = 0 has one clock",
    )
    for stream in ("texture", "semantic"):
        have, want = getattr(statistics, f"{stream}_channels"), getattr(model, f"{stream}_channels")
        require(
            have == want,
            f"statistics of {have} {stream} channels for a model with {want}: they belong to another data set",
        )
    require(
        texture_codec.latent_channels == model.texture_channels,
        f"the texture codec has {texture_codec.latent_channels} latent channels, the model {model.texture_channels} "
        "texture channels: use the codec that the latents were encoded with",
    )
    if guide is None:
        return
    for name in ("grid_size", "texture_channels", "semantic_channels", "num_classes", "two_clocks"):
        require(
            getattr(guide, name) == getattr(model, name),
            f"the guide has {name} = {getattr(guide, name)}, the model {getattr(model, name)}: a guide is trained on "
            "the same latents and classes",
        )
