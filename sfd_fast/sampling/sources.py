"""Where a pipeline comes from: a folder here, a pipeline on the Hugging Face hub, or the authors' published weights."""

import tempfile
from pathlib import Path

from sfd_fast.config import SamplerConfig, require
from sfd_fast.diffusion.statistics import SEMANTIC_FILE, TEXTURE_FILE, LatentStatistics
from sfd_fast.files.documents import read_json
from sfd_fast.files.home import with_home
from sfd_fast.files.torch_file import read_torch_file
from sfd_fast.formats.hub import Repository
from sfd_fast.formats.imagenet import imagenet_names
from sfd_fast.formats.marked_folder import MARK, WEIGHTS, strangers
from sfd_fast.formats.model_folder import READABLE, REST
from sfd_fast.formats.released_model import convert_released
from sfd_fast.formats.released_weights import (
    CODEC_FILE,
    CODEC_REPOSITORY,
    REPOSITORY,
    STATISTICS_FILES,
    VARIANTS,
    Checkpoint,
    Variant,
    published,
)
from sfd_fast.sampling.pipeline_folder import (
    INDEX,
    PipelineSettings,
    check_parts,
    folder_of_model,
    load_parts,
    save_parts,
)

PARTS = ("transformer", "guide", "texture_codec")
PIPELINE_FILES = (
    INDEX, WEIGHTS, READABLE, MARK, REST, *(f"{part}/{name}" for part in PARTS for name in (WEIGHTS, READABLE, MARK)),
    "texture_codec/diffusion_pytorch_model.safetensors", f"statistics/{TEXTURE_FILE}", f"statistics/{SEMANTIC_FILE}",
)  # fmt: skip
"""all that sampling reads of a pipeline's or network's folder"""


@with_home
def local_folder(
    source: str | Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The folder of a pipeline or a network that `source` names, be it a run directory, or on the Hugging Face hub.

    A name of the hub ("owner/name") is fetched once. variant: which of the authors' models ("SFD-Project/SFD" holds
    several). revision: branch, tag or commit.
    Raises FileNotFoundError where nothing is found, OSError where the hub or the disk fails, ValueError for what is no
    model, and for damaged files.
    """
    path = Path(source)
    if path.exists():
        require(variant is None, f"variant '{variant}' belongs to the hub's {REPOSITORY}; {source} is a folder here")
        return folder_of_model(path)
    if path.is_absolute() or str(source).count("/") != 1 or str(source).startswith("."):
        raise FileNotFoundError(f"model folder {source} does not exist")
    options = {"revision": revision, "token": token, "cache_dir": cache_dir}
    if str(source) == REPOSITORY:
        names = ", ".join(VARIANTS)
        require(variant is not None, f"{REPOSITORY} holds several models: give variant=, or `sfd download`; {names}")
        return released_pipeline(variant, **options)
    require(variant is None, f"variant '{variant}' belongs to {REPOSITORY}, not to {source}")
    try:
        repository = Repository(str(source), **options)
        return repository.fetch(repository.find(PIPELINE_FILES))
    except OSError as error:
        raise FileNotFoundError(
            f"{source} is neither a folder here nor a model that could be fetched from the Hugging Face hub: {error}"
        ) from error


@with_home
def released_pipeline(
    name: str,
    target: Path | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The authors' model of that name as a pipeline folder: its files fetched, converted and put together once.

    target: the folder to make; default one in the cache. Raises as local_folder, and ValueError where target holds
    something else.
    """
    from huggingface_hub.utils import WeakFileLock

    chosen = published(name)
    models = Repository(REPOSITORY, revision=revision, token=token, cache_dir=cache_dir)
    codecs = Repository(CODEC_REPOSITORY, token=token, cache_dir=cache_dir)
    target = target or models.cache / "pipelines" / f"{name}-{models.commit[:12]}-{codecs.commit[:12]}"
    paths = [chosen.main.path, chosen.guide.path, *STATISTICS_FILES]
    origin = {"variant": name, REPOSITORY: [models.commit, *paths], CODEC_REPOSITORY: [codecs.commit, CODEC_FILE]}
    target.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(target.with_name(f".{target.name}.lock")):
        if not is_made_of(target, origin):
            assemble(chosen, target, origin, models, codecs)
    return target


def assemble(chosen: Variant, target: Path, origin: dict, models: Repository, codecs: Repository) -> None:
    """Fetches a model's files, converts them and puts the pipeline in place of target."""
    folder = models.fetch(models.require([chosen.main.path, chosen.guide.path, *STATISTICS_FILES]))
    codec = codecs.fetch(codecs.require([CODEC_FILE])) / CODEC_FILE
    with tempfile.TemporaryDirectory(dir=models.cache) as scratch:
        for part, network in (("main", chosen.main), ("guide", chosen.guide)):
            convert_checkpoint(folder / network.path, Path(scratch, part), network)
        convert_released(codec, Path(scratch, "codec"), keep_training_state=False)
        statistics = LatentStatistics.load((folder / STATISTICS_FILES[0]).parent)
        parts = load_parts(Path(scratch, "main"), Path(scratch, "guide"), Path(scratch, "codec"), statistics)
        network, guide, codec, delta_t = (parts[key] for key in ("transformer", "guide", "texture_codec", "delta_t"))
        check_parts(network.config, statistics, codec, delta_t, guide.config)
        save_parts(
            target, network, guide, codec, statistics, parts["training"],
            PipelineSettings(delta_t, 32, SamplerConfig(), chosen.guidance, statistics.multiplier),
            imagenet_names(network.config.num_classes), {"origin": origin},
        )  # fmt: skip


def convert_checkpoint(file: Path, target: Path, network: Checkpoint) -> None:
    """One of the authors' networks as our folder; settings that its file lacks are the published ones."""
    carried = read_torch_file(file)
    settings = None if isinstance(carried, dict) and carried.get("config") else network.settings
    convert_released(file, target, config=settings, keep_training_state=False)


def is_made_of(target: Path, origin: dict) -> bool:
    """Whether a folder was made of these files, as its pipeline.json says.

    Raises ValueError where it holds something that is not replaced.
    """
    strangers(target)
    if not (target / INDEX).is_file():
        return False
    made_of = read_json(target / INDEX).get("origin")
    require(
        made_of is not None,
        f"{target} holds a pipeline that `sfd download` did not make, so it is not replaced: choose another folder "
        "with --out, or move it away",
    )
    return made_of == origin
