"""The 2015 TensorFlow Inception graph that FID, sFID and the Inception Score are defined on, in PyTorch.

Shapes: B batch, C channels, H height, W width.

Parameter names are torchvision's (and pytorch-fid's), so the published conversion of the graph loads as it is. What the
graph does differently from torchvision's Inception v3, each checked against the conversion scripts of pytorch-fid and
torch-fidelity and against guided-diffusion's evaluator:
- images are resized to 299 x 299 by TensorFlow 1's bilinear rule (corner-aligned pixels, no half-pixel centres, no
  antialias) and
  scaled as (x - 128) / 128;
- average pools in the mixed blocks leave the zero padding out of the mean; the pool of the very last block is a max
  pool;
- 1008 outputs, of which the score uses the logits without their bias;
- `mixed_6/conv`, the spatial features of sFID, is the first 1x1 unit (after batch norm and ReLU) of torchvision's
  Mixed_6d: the graph
  counts mixed, mixed_1, mixed_2 = 5b, 5c, 5d; mixed_3 = 6a; mixed_4 .. mixed_7 = 6b .. 6e; mixed_8 .. mixed_10 = 7a ..
  7c.
Sources: guided-diffusion evaluations/evaluator.py; torch-fidelity utils/util_convert_inception_weights.py; Szegedy et
al. 2015.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_SIZE = 299
NUM_POOL_FEATURES = 2048
NUM_SPATIAL_CHANNELS = 7  # evaluator.py: spatial[..., :7], so that 17 * 17 * 7 = 2023 is close to 2048
NUM_SPATIAL_FEATURES = 17 * 17 * NUM_SPATIAL_CHANNELS
NUM_CLASSES = 1008


def legacy_resize(images: Tensor, size: int = IMAGE_SIZE) -> Tensor:
    """TensorFlow 1's ResizeBilinear with align_corners=False and half_pixel_centers=False.

    Output pixel i reads the source at i * (in / out): a = floor of it, b = min(a + 1, in - 1), and the value is
    x[a] + (x[b] - x[a]) * fraction, first along the width, then along the height, all in fp32 as in the graph.
    images: (B, C, H, W), floating point. Returns (B, C, size, size).
    """

    def taps(num_pixels: int) -> tuple[Tensor, Tensor, Tensor]:
        scale = torch.tensor(num_pixels / size, dtype=torch.float32, device=images.device)
        position = torch.arange(size, dtype=torch.float32, device=images.device) * scale
        low = position.long()
        return low, (low + 1).clamp_max(num_pixels - 1), (position - low).to(images.dtype)

    low, high, fraction = taps(images.shape[3])
    left, right = images.index_select(3, low), images.index_select(3, high)
    rows = left + (right - left) * fraction
    low, high, fraction = taps(images.shape[2])
    top, bottom = rows.index_select(2, low), rows.index_select(2, high)
    return top + (bottom - top) * fraction[:, None]


class Unit(nn.Module):
    """ReLU(BatchNorm(Conv(x))), the graph's `conv` scope."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def average_pool(x: Tensor) -> Tensor:
    """3x3 average at stride 1; the padding does not count, as in TensorFlow."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Mixed5(nn.Module):
    """35 x 35 blocks: 1x1, 5x5, double 3x3 and pool branches."""

    def __init__(self, in_channels: int, pool_channels: int):
        super().__init__()
        self.branch1x1 = Unit(in_channels, 64, 1)
        self.branch5x5_1 = Unit(in_channels, 48, 1)
        self.branch5x5_2 = Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Unit(in_channels, 64, 1)
        self.branch3x3dbl_2 = Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, padding=1)
        self.branch_pool = Unit(in_channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        pool = self.branch_pool(average_pool(x))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, pool], dim=1)


class Reduce6(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch3x3 = Unit(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = Unit(in_channels, 64, 1)
        self.branch3x3dbl_2 = Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class Mixed6(nn.Module):
    """17 x 17 blocks with factored 7x7 convolutions."""

    def __init__(self, width: int):
        super().__init__()
        row, column = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Unit(768, 192, 1)
        self.branch7x7_1 = Unit(768, width, 1)
        self.branch7x7_2 = Unit(width, width, **row)
        self.branch7x7_3 = Unit(width, 192, **column)
        self.branch7x7dbl_1 = Unit(768, width, 1)
        self.branch7x7dbl_2 = Unit(width, width, **column)
        self.branch7x7dbl_3 = Unit(width, width, **row)
        self.branch7x7dbl_4 = Unit(width, width, **column)
        self.branch7x7dbl_5 = Unit(width, 192, **row)
        self.branch_pool = Unit(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(average_pool(x))], dim=1)


class Reduce7(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = Unit(768, 192, 1)
        self.branch3x3_2 = Unit(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Unit(768, 192, 1)
        self.branch7x7x3_2 = Unit(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Unit(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Unit(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), long, F.max_pool2d(x, 3, stride=2)], dim=1)


class Mixed7(nn.Module):
    """8 x 8 blocks; the last one max-pools where the other averages (so it stands in the graph)."""

    def __init__(self, in_channels: int, *, max_pool: bool):
        super().__init__()
        self.max_pool = max_pool
        row, column = {"kernel": (1, 3), "padding": (0, 1)}, {"kernel": (3, 1), "padding": (1, 0)}
        self.branch1x1 = Unit(in_channels, 320, 1)
        self.branch3x3_1 = Unit(in_channels, 384, 1)
        self.branch3x3_2a = Unit(384, 384, **row)
        self.branch3x3_2b = Unit(384, 384, **column)
        self.branch3x3dbl_1 = Unit(in_channels, 448, 1)
        self.branch3x3dbl_2 = Unit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Unit(384, 384, **row)
        self.branch3x3dbl_3b = Unit(384, 384, **column)
        self.branch_pool = Unit(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pool = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else average_pool(x)
        return torch.cat([
            self.branch1x1(x),
            self.branch3x3_2a(single), self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
            self.branch_pool(pool),
        ], dim=1)  # fmt: skip


class Inception(nn.Module):
    """Inception v3 as of 2015-12-05. Made in evaluation mode, without gradients; the weights come from
    `load_inception`."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b = Mixed5(192, 32)
        self.Mixed_5c = Mixed5(256, 64)
        self.Mixed_5d = Mixed5(288, 64)
        self.Mixed_6a = Reduce6(288)
        self.Mixed_6b = Mixed6(128)
        self.Mixed_6c = Mixed6(160)
        self.Mixed_6d = Mixed6(160)
        self.Mixed_6e = Mixed6(192)
        self.Mixed_7a = Reduce7()
        self.Mixed_7b = Mixed7(1280, max_pool=False)
        self.Mixed_7c = Mixed7(2048, max_pool=True)
        self.fc = nn.Linear(NUM_POOL_FEATURES, NUM_CLASSES)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Inception":
        """Stays in evaluation mode: batch statistics would change every figure."""
        return super().train(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pool and spatial features.

        images: (B, 3, H, W), floating point in [0, 255].
        Returns pool (B, 2048), the mean over the last 8 x 8 grid, and spatial (B, 2023), `mixed_6/conv[..., :7]`
        flattened (row, column, channel) as in the evaluator, the order of stored mu_s and sigma_s.
        """
        x = (legacy_resize(images) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.branch1x1(x)[:, :NUM_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3)), spatial

    def logits(self, pool: Tensor) -> Tensor:
        """Class scores without the bias, as the evaluator takes them. pool: (B, 2048). Returns (B, 1008)."""
        return F.linear(pool, self.fc.weight)
