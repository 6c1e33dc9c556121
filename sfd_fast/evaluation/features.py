"""Feature extractors: uint8 images in, the features that the metrics compare out. Inception, DINOv2, and 8 x 8 pixels.

Shapes: B batch, F features, S spatial features, K classes, H height, W width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfd_fast.config.checks import one_of
from sfd_fast.config.evaluation import FeatureKind
from sfd_fast.evaluation.inception import NUM_POOL_FEATURES, NUM_SPATIAL_FEATURES
from sfd_fast.evaluation.weights import load_inception
from sfd_fast.files.pretrained import load_pretrained


class Features(NamedTuple):
    """pool (B, F) fp32 for every metric; spatial (B, S) fp32 for sFID, None where the extractor has none."""

    pool: Tensor
    spatial: Tensor | None = None


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32 within: a training loop sets both, and either would shift every figure."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, value in zip(settings, before):
            setting.fp32_precision = value


def check_images(images: Tensor) -> None:
    """Raises ValueError unless images are uint8 of shape (B, H, W, 3)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f"images must be uint8 of shape (B, H, W, 3); got {images.dtype} {tuple(images.shape)}. Decoded images in "
            "[-1, 1] become (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)"
        )


class FeatureExtractor(nn.Module):
    """Base: `extractor(images)` checks the images and runs `extract` in full fp32 without gradients.

    kind: its name in statistics files; num_features F; num_spatial_features S (0: no sFID); has_logits: Inception Score
    or not;
    source: where its weights came from, for the report. images: uint8 (B, H, W, 3) on the extractor's device.
    """

    kind = ""
    num_features = 0
    num_spatial_features = 0
    has_logits = False

    def __init__(self):
        super().__init__()
        self.source: dict[str, str | bool] = {}

    def forward(self, images: Tensor) -> Features:
        """Features of images. Raises ValueError unless they are uint8 (B, H, W, 3)."""
        check_images(images)
        with torch.inference_mode(), full_precision(images.device):
            return self.extract(images.permute(0, 3, 1, 2))

    def extract(self, images: Tensor) -> Features:
        """Features of uint8 images (B, 3, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} must define extract(images)")

    def logits(self, pool: Tensor) -> Tensor:
        """Class scores (B, K) from pooled features (B, F). Raises ValueError where the features have no classes."""
        raise ValueError(f"{self.kind} features have no class scores, so no Inception Score: use --features inception")


class InceptionFeatures(FeatureExtractor):
    """Pool and spatial features and logits of the 2015 Inception graph (see inception.py). weights: see
    `find_weights`."""

    kind = "inception"
    num_features = NUM_POOL_FEATURES
    num_spatial_features = NUM_SPATIAL_FEATURES
    has_logits = True

    def __init__(self, weights: str | None = None):
        super().__init__()
        self.network, self.source = load_inception(weights)

    def extract(self, images: Tensor) -> Features:
        return Features(*self.network(images.float()))

    def logits(self, pool: Tensor) -> Tensor:
        with torch.inference_mode(), full_precision(pool.device):
            return self.network.logits(pool)


class DinoV2Features(FeatureExtractor):
    """Normalised class token of DINOv2, the features of FD-DINOv2.

    Images are resized to 224 x 224 with Pillow's bicubic filter (antialiased, rounded back to 8 bits) and standardised
    by ImageNet's mean and deviation. weights: a folder in the Hugging Face layout or a hub name; the published metric
    uses ViT-L/14 without registers. The position embedding is interpolated as transformers does, which differs from
    torch.hub's model in the last digits.
    Source: Stein et al. 2023 (arXiv 2306.04675), dgm_eval/models/dinov2.py.
    """

    kind = "dinov2"
    published = "facebook/dinov2-large"

    def __init__(self, weights: str | None = None):
        super().__init__()
        try:
            from transformers import AutoModel

            source = weights or self.published
            network = load_pretrained(AutoModel, source, setting="--weights", trust_remote_code=False)
            self.network = network.requires_grad_(False)
        except (ImportError, OSError, ValueError) as error:
            raise ValueError(
                f"cannot load DINOv2 from {weights or self.published}: {error} (`hf download {self.published}`), or "
                "--features digits for small images"
            ) from error
        if not self.network.config.model_type.startswith("dinov2"):
            raise ValueError(
                f"{weights} is a {self.network.config.model_type} model, but FD-DINOv2 is defined on dinov2"
            )
        self.num_features = self.network.config.hidden_size
        self.source = {"path": weights or self.published, "published": weights in (None, self.published)}
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def extract(self, images: Tensor) -> Features:
        pixels = images.float()
        if pixels.shape[2:] != (224, 224):
            pixels = F.interpolate(pixels, (224, 224), mode="bicubic", antialias=True).round().clamp(0, 255)
        return Features(self.network((pixels / 255 - self.mean) / self.std).pooler_output.float())


class DigitsFeatures(FeatureExtractor):
    """Pixels themselves, for the embedded demo and other small images: 64 grey values in [0, 1].

    Grey = mean of the channels, averaged over an 8 x 8 grid of equal cells, divided by 255. An image that is an 8 x 8
    picture enlarged by repetition gives back exactly that picture, so for scikit-learn's digits the Frechet distance is
    that of the raw pixels. It needs no weights and sees only coarse shape: a check that training works, not a figure to
    publish.
    """

    kind = "digits"
    num_features = 64
    grid = 8

    def extract(self, images: Tensor) -> Features:
        if min(images.shape[2:]) < self.grid:
            raise ValueError(
                f"digits features need images of at least 8 x 8 pixels; got {images.shape[2]} x {images.shape[3]}"
            )
        grey = images.float().mean(dim=1, keepdim=True) / 255
        return Features(F.adaptive_avg_pool2d(grey, self.grid).flatten(1))


def build_extractor(kind: str, weights: str | None = None, *, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The extractor named by `--features`. Raises ValueError for an unknown kind and where its weights cannot be
    had."""
    one_of("features", kind, FeatureKind)
    if kind == "digits":
        if weights is not None:
            raise ValueError(f"digits features are pixels and take no weights; got --weights {weights}")
        return DigitsFeatures().to(device)
    extractor = (InceptionFeatures if kind == "inception" else DinoV2Features)(weights).to(device)
    if torch.device(device).type == "cpu":
        extractor = extractor.to(
            memory_format=torch.channels_last
        )  # 26 % less time for Inception on one core (measured)
    return extractor
