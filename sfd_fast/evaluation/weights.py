"""Inception's weights: finding, fetching, verifying and loading the published file."""

import hashlib
from pathlib import Path

import torch

from sfd_fast.evaluation.inception import Inception
from sfd_fast.files.torch_file import read_torch_file

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_NAME}"
WEIGHTS_SHA256_PREFIX = "6726825d"  # the published name carries the first eight digits of its SHA-256


def find_weights(weights: str | None = None) -> Path:
    """The file with Inception's weights.

    weights: a path, "download" (fetched from the pytorch-fid release into torch.hub's cache, checksum verified), or
    None (torch.hub's cache, where pytorch-fid and this function keep it). Raises ValueError naming the file where there
    is none.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME
    if weights == "download":
        if not cached.is_file():
            cached.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(WEIGHTS_URL, str(cached), hash_prefix=WEIGHTS_SHA256_PREFIX)
            except (OSError, RuntimeError) as error:
                raise ValueError(
                    f"could not download Inception's weights from {WEIGHTS_URL}: {error}. Fetch {WEIGHTS_NAME} on "
                    "another machine "
                    "and give its path as --weights"
                ) from error
        return cached
    path = cached if weights is None else Path(weights)
    if not path.is_file():
        raise ValueError(
            f"no Inception weights at {path}. FID, sFID and the Inception Score need {WEIGHTS_NAME} from "
            f"{WEIGHTS_URL}: give its path "
            "as --weights, or --weights download to fetch it; --features digits (small images) and --features dinov2 "
            "do without it"
        )
    return path


def load_inception(weights: str | None = None) -> tuple[Inception, dict[str, str | bool]]:
    """The network with its weights, and where they came from.

    weights: see `find_weights`. Returns (network, {"path", "sha256", "published"}): `published` tells whether the
    checksum is that of the file everybody uses. Raises ValueError for an absent or damaged file and for weights of
    another network.
    """
    path = find_weights(weights)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        state = read_torch_file(path)
    except ValueError as error:
        raise ValueError(
            f"{path} (SHA-256 {sha256}) cannot be read as PyTorch weights: {error}. It may be cut short; fetch it "
            f"again from {WEIGHTS_URL}"
        ) from error
    network = Inception()
    own = network.state_dict()
    optional = {name for name in own if name.endswith("num_batches_tracked")}  # a counter that evaluation never reads
    entries = state.items() if isinstance(state, dict) else ()
    named = {name: value for name, value in entries if isinstance(name, str) and isinstance(value, torch.Tensor)}
    given = {name: value for name, value in named.items() if name not in optional}
    wrong = sorted(own.keys() - optional - given.keys()) + sorted(given.keys() - own.keys())
    wrong += [name for name in given if name in own and given[name].shape != own[name].shape]
    if wrong:
        raise ValueError(
            f"{path} does not hold the 2015 Inception network: {len(wrong)} entries are missing, unknown or of another "
            "shape, for example "
            f"{', '.join(wrong[:3])}. Wanted: {WEIGHTS_NAME} from {WEIGHTS_URL} (torchvision's ImageNet weights give "
            "other figures)"
        )
    network.load_state_dict(given, strict=False)
    return network, {"path": str(path), "sha256": sha256, "published": sha256.startswith(WEIGHTS_SHA256_PREFIX)}
