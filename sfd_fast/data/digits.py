"""The embedded demo's world: scikit-learn's 8 x 8 handwritten digits, a small encoder that plays the VFM, and a judge.

Letters: B batch, N images, F = 32 width of a feature.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor, nn
from tqdm import tqdm

from sfd_fast.diffusion import random_numbers
from sfd_fast.diffusion.transport import feature_map, feature_tokens

FEATURE_CHANNELS = 32
NUM_HELD_OUT = 500
LEVELS = 16
"""the digits have 17 grey levels, 0 to 16"""


@dataclass(frozen=True)
class Digits:
    """Images (N, 3, 8, 8) in [-1, 1], the three colours alike, and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load(seed: int) -> tuple[Digits, Digits]:
    """Training and held-out digits, 1297 and 500 of the 1797, divided by (seed)."""
    source = load_digits()
    images = torch.from_numpy(source.images).float()[:, None] / (LEVELS / 2) - 1
    order = random_numbers.permutation(len(images), seed=seed, stream=random_numbers.DATA_ORDER)
    images, labels = images.expand(-1, 3, -1, -1)[order].contiguous(), torch.from_numpy(source.target)[order].long()
    cut = len(images) - NUM_HELD_OUT
    return Digits(images[:cut], labels[:cut]), Digits(images[cut:], labels[cut:])


class PatchEncoder(nn.Module):
    """A small convolutional classifier whose last feature map, normalised, plays DINOv2's patch tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.GELU(),
            nn.Conv2d(32, 64, 2, stride=2), nn.GELU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.GELU(),
            nn.Conv2d(64, FEATURE_CHANNELS, 3, padding=1),
        )  # fmt: skip
        self.norm = nn.LayerNorm(FEATURE_CHANNELS, elementwise_affine=False)
        self.head = nn.Linear(16 * FEATURE_CHANNELS, 10)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, 8, 8) in [-1, 1] -> (B, F, 4, 4), normalised along F."""
        tokens = self.norm(feature_tokens(self.body(images[:, :1])))  # (B, 16, F)
        return feature_map(tokens).contiguous()

    def forward(self, images: Tensor) -> Tensor:
        """Class scores, (B, 10)."""
        return self.head(self.features(images).flatten(1))


def train_encoder(
    digits: Digits, *, seed: int, num_steps: int, progress: bool = True
) -> tuple[PatchEncoder, list[float]]:
    """The encoder trained as a classifier on shifted digits; returns it with the loss of every step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = PatchEncoder()
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3, weight_decay=0.05)
        losses = []
        for _ in tqdm(range(num_steps), desc="patch encoder", disable=not progress, unit="step"):
            chosen = torch.randint(len(digits), (64,))
            down, right = torch.randint(-1, 2, (2,)).tolist()
            images = F.pad(digits.images[chosen], (1, 1, 1, 1), value=-1.0)
            images = images.roll((down, right), (2, 3))[:, :, 1:-1, 1:-1]
            images = images + 0.1 * torch.randn_like(images)
            loss = F.cross_entropy(encoder(images), digits.labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return encoder.eval().requires_grad_(False), losses


def pixels(images: np.ndarray) -> np.ndarray:
    """Grey values in [0, 1] of (N, 8, 8, 3) uint8 images, (N, 64) float64."""
    return images[..., 0].reshape(len(images), -1) / 255.0


class Judge:
    """A support vector classifier trained on real digits, and distances to the nearest one."""

    def __init__(self, train: np.ndarray, labels: np.ndarray) -> None:
        """train: (N, 8, 8, 3) uint8."""
        self.train = pixels(train)
        self.classifier = SVC(C=10.0, gamma=0.25).fit(self.train, labels)

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Share of images recognised as their label."""
        return float(self.classifier.score(pixels(images), labels))

    def nearest_distance(self, images: np.ndarray) -> float:
        """Median over images of the Euclidean distance to the nearest training digit (pixels in [0, 1])."""
        distances = torch.cdist(torch.from_numpy(pixels(images)), torch.from_numpy(self.train))
        return float(distances.min(dim=1).values.median())
