"""`sfd convert`: released checkpoints, autoencoders and configurations to ours, ours (folders and training checkpoints)
to the released format, and several parts to one pipeline folder."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from sfd_fast.config import Settings, require, to_dict
from sfd_fast.config.checks import FilePath, Positive
from sfd_fast.files.atomic import write_atomically
from sfd_fast.files.overwrite import begins_with, never, require_free

YAML = (".yaml", ".yml")
TORCH_FILES = (".pt", ".pth", ".ckpt")
YAML_MARK = "# written by `sfd convert`"


@dataclass(frozen=True)
class ConvertConfig(Settings):
    """Options of `sfd convert`.

    A released file becomes a folder, a folder becomes a released file, a training checkpoint of any engine, number of
    ranks and ZeRO stage becomes either, a released YAML becomes one of ours. With `texture_codec` and `statistics` the
    result is a whole pipeline folder for `sfd sample` and SFDPipeline. It samples on the exact grid (the released one
    on request, docs/METHOD.md 5).
    """

    source: FilePath
    """released .pt, .ckpt, .safetensors or .yaml, one of our folders, a run directory or one checkpoint of it"""
    target: FilePath
    """folder to write, or with a folder as source the .pt to write, or with a YAML as source the YAML to write"""
    settings: FilePath = ""
    """released YAML for a file that carries no configuration"""
    weights: str = "ema"
    """which weights are sampled with: ema or model; of a training checkpoint also ema_1, ema_2, ... (extra averages)"""
    keep_training_state: bool = True
    """also keep optimizer and raw weights, so that converting back gives the identical file"""
    texture_codec: FilePath = ""
    """texture autoencoder (released .ckpt or our folder) of the pipeline to assemble"""
    statistics: FilePath = ""
    """folder with latents_stats.pt and latents_sv_stats.pt of the TRAINING latents"""
    guide: FilePath = ""
    """AutoGuidance's weaker model, released .pt or our folder; it must come from the same cache"""
    latent_multiplier: Positive | None = None
    """what latents were multiplied by in training; default: as the model's own settings say"""
    overwrite: bool = False
    """write a .pt in place of one that is there, or a .yaml of unknown origin; a folder of unknown origin never"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.guide or bool(self.texture_codec and self.statistics),
            "a guide belongs to a whole pipeline: give --texture_codec and --statistics too",
        )
        require(
            bool(self.texture_codec) == bool(self.statistics),
            "a pipeline needs both --texture_codec and --statistics (of the latents the model was trained on)",
        )
        require(
            re.fullmatch(r"model|ema(_[1-9]\d*)?", self.weights) is not None,
            f"weights '{self.weights}' is unknown; choose ema, model, or ema_1, ema_2, ... of a training checkpoint",
        )


def run_convert(config: ConvertConfig) -> None:
    """Does what the kinds of source and target ask for. ValueError or OSError where they do not fit."""
    from sfd_fast.formats.released_model import convert_released, export_released
    from sfd_fast.training.export import export_checkpoint, export_released_checkpoint, is_checkpoint

    source, target = Path(config.source), Path(config.target)
    if not source.exists():
        raise FileNotFoundError(f"source {source} does not exist")
    require(
        target.suffix != ".safetensors",
        f"target {target}: name a folder to get model.safetensors with its configuration, or a .pt for the released "
        "format",
    )
    if source.suffix in YAML:
        convert_yaml(source, target, config.overwrite)
    elif source.is_dir() and target.suffix in TORCH_FILES:
        require_free(target, never, overwrite=config.overwrite)
        if is_checkpoint(source):
            export_released_checkpoint(source, target, weights=config.weights)
        else:
            export_released(source, target)
        print(f"wrote {target} in the released format")
    elif config.texture_codec:
        assemble(config)
        print(f"wrote the pipeline {target}: sfd sample --model {target}")
    elif is_checkpoint(source):
        export_checkpoint(source, target, weights=config.weights)
        print(f"wrote {target} ({config.weights}): sfd sample --model {target}")
    else:
        require(
            source.is_file(),
            f"{source} is a folder and {target} too: name a .pt file as target to export, or give --texture_codec and "
            "--statistics to assemble a pipeline",
        )
        result = convert_released(
            source, target, config=config.settings or None, weights=config.weights,
            keep_training_state=config.keep_training_state,
        )  # fmt: skip
        print(f"wrote {target} ({result.kind})")
        if result.ignored:
            print(f"settings without a counterpart here, kept for the way back: {', '.join(result.ignored)}")


def convert_yaml(source: Path, target: Path, overwrite: bool) -> None:
    """A released configuration as one for `sfd train --config`."""
    from sfd_fast.formats.released_config import read_config, read_settings

    require(target.suffix in YAML, f"a configuration becomes a configuration: name a .yaml as target, not {target}")
    require_free(target, begins_with(YAML_MARK), overwrite=overwrite)
    settings, ignored = read_config(read_settings(source))
    text = yaml.safe_dump(to_dict(settings), sort_keys=False)
    write_atomically(target, f"{YAML_MARK} from {source.name}\n{text}")
    print(f"wrote {target}: sfd train --config {target}")
    if ignored:
        print(f"settings without a counterpart here: {', '.join(ignored)}")


def assemble(config: ConvertConfig) -> None:
    """Networks, codec and statistics as one pipeline folder."""
    import torch

    from sfd_fast.diffusion.statistics import LatentStatistics
    from sfd_fast.formats.imagenet import imagenet_names
    from sfd_fast.formats.model_folder import read_config
    from sfd_fast.formats.released_model import convert_released
    from sfd_fast.sampling.pipeline import SFDPipeline
    from sfd_fast.training.export import export_checkpoint, is_checkpoint

    with tempfile.TemporaryDirectory() as scratch:
        folders = {}
        for name, path in (("model", config.source), ("guide", config.guide), ("codec", config.texture_codec)):
            if path and Path(path).is_file():
                folders[name] = Path(scratch, name)
                settings = config.settings or None if name == "model" else None
                convert_released(path, folders[name], config=settings, weights=config.weights)
            elif path and is_checkpoint(path):
                folders[name] = Path(scratch, name)
                export_checkpoint(path, folders[name], weights=config.weights)
            elif path:
                folders[name] = Path(path)
        trained = read_config(folders["model"])
        data = trained.data
        multiplier = config.latent_multiplier
        if multiplier is None:
            multiplier = data.latent_multiplier
        statistics = LatentStatistics.load(config.statistics, multiplier).standardising(
            texture=data.normalise_texture, semantic=data.normalise_semantic
        )
        known = imagenet_names(trained.model.num_classes) if "imagenet" in data.path.lower() else None
        SFDPipeline.from_pretrained(
            folders["model"],
            guide=folders.get("guide"),
            texture_codec=folders["codec"],
            statistics=statistics,
            device="cpu",
            torch_dtype=torch.float32,
            **({} if known is None else {"id2label": known}),
        ).save_pretrained(config.target)
