"""The evaluator's metrics and the 2015 Inception graph written a second time, straightforwardly in fp64, to compare
with.

Shares nothing with sfd_fast.evaluation: NumPy loops and formulas from the papers; the network is a table of TensorFlow
scopes run through plain convolutions.
"""

import numpy as np
import torch
import torch.nn.functional as F


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """From the features themselves: tr (S_x S_y)^(1/2) is the sum of the singular values of X Y^T / sqrt((n - 1)(m -
    1)), with X, Y centred, which needs no square root of a matrix and is exact for singular covariances."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    xc, yc = x - x.mean(0), y - y.mean(0)
    n, m = len(x) - 1, len(y) - 1
    singular_values = np.linalg.svd(xc @ yc.T, compute_uv=False)
    distance = ((x.mean(0) - y.mean(0)) ** 2).sum() + (xc**2).sum() / n + (yc**2).sum() / m
    return distance - 2 * singular_values.sum() / np.sqrt(n * m)


def inception_score(logits: np.ndarray, split_size: int) -> float:
    scores = []
    for start in range(0, len(logits), split_size):
        z = logits[start : start + split_size].astype(np.float64)
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        kl = [sum(p_k * (np.log(p_k) - np.log(m_k)) for p_k, m_k in zip(row, p.mean(0)) if p_k > 0) for row in p]
        scores.append(np.exp(np.mean(kl)))
    return float(np.mean(scores))


def half_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|u|^2 - 2 u v + |v|^2 in NumPy's float16, sums of products in float32: evaluator.py's graph on a GPU."""
    a, b = a.astype(np.float16), b.astype(np.float16)
    square = [
        (x.astype(np.float32) ** 2).astype(np.float16).astype(np.float32).sum(1).astype(np.float16) for x in (a, b)
    ]
    cross = (a.astype(np.float32) @ b.astype(np.float32).T).astype(np.float16)
    return np.maximum((square[0][:, None] - 2 * cross) + square[1], np.float16(0)).astype(np.float32)


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, k: int, *, half: bool = False
) -> tuple[float, float]:
    def distances(a, b):
        return half_distances(a, b) if half else np.array([[((u - v) ** 2).sum() for v in b] for u in a])

    reference, samples = reference.astype(np.float64), samples.astype(np.float64)
    radius_reference = np.sort(distances(reference, reference), axis=1)[:, k]
    radius_samples = np.sort(distances(samples, samples), axis=1)[:, k]
    between = distances(reference, samples)
    precision = np.mean([(between[:, j] <= radius_reference).any() for j in range(len(samples))])
    recall = np.mean([(between[i] <= radius_samples).any() for i in range(len(reference))])
    return float(precision), float(recall)


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased MMD^2 of two whole sets of equal size, kernel (x y / F + 1)^3."""
    x, y = x.astype(np.float64), y.astype(np.float64)

    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    n = len(x)
    same = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return same - 2 * sum(kernel(a, b) for a in x for b in y) / n**2


def legacy_resize(image: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow 1's bilinear resize of one (H, W, C) image as a product with two matrices, filled row by row; fp32
    positions."""

    def matrix(num_pixels):
        rows = np.zeros((size, num_pixels))
        for i in range(size):
            position = np.float32(i) * np.float32(num_pixels / size)
            low = int(position)
            rows[i, low] += 1 - (float(position) - low)
            rows[i, min(low + 1, num_pixels - 1)] += float(position) - low
        return rows

    return np.einsum("ih,hwc,jw->ijc", matrix(image.shape[0]), image, matrix(image.shape[1]), optimize=True)


# TensorFlow's blocks, branch by branch in the order of `join`. A branch is a chain of name:kernel:out units, with :2
# for a stride and :valid for no padding, after an optional pool; a | b is a fork whose two ends are joined. Kernels are
# height x width; padding is "same" unless the unit is strided or says valid.
BLOCKS = {
    "5": [
        "branch1x1:1x1:64",
        "branch5x5_1:1x1:48 branch5x5_2:5x5:64",
        "branch3x3dbl_1:1x1:64 branch3x3dbl_2:3x3:96 branch3x3dbl_3:3x3:96",
        "avg branch_pool:1x1:{0}",
    ],
    "6a": [
        "branch3x3:3x3:384:2",
        "branch3x3dbl_1:1x1:64 branch3x3dbl_2:3x3:96 branch3x3dbl_3:3x3:96:2",
        "stridedmax",
    ],
    "6": [
        "branch1x1:1x1:192",
        "branch7x7_1:1x1:{0} branch7x7_2:1x7:{0} branch7x7_3:7x1:192",
        "branch7x7dbl_1:1x1:{0} branch7x7dbl_2:7x1:{0} branch7x7dbl_3:1x7:{0} branch7x7dbl_4:7x1:{0} "
        "branch7x7dbl_5:1x7:192",
        "avg branch_pool:1x1:192",
    ],
    "7a": [
        "branch3x3_1:1x1:192 branch3x3_2:3x3:320:2",
        "branch7x7x3_1:1x1:192 branch7x7x3_2:1x7:192 branch7x7x3_3:7x1:192 branch7x7x3_4:3x3:192:2",
        "stridedmax",
    ],
    "7": [
        "branch1x1:1x1:320",
        "branch3x3_1:1x1:384 branch3x3_2a:1x3:384|branch3x3_2b:3x1:384",
        "branch3x3dbl_1:1x1:448 branch3x3dbl_2:3x3:384 branch3x3dbl_3a:1x3:384|branch3x3dbl_3b:3x1:384",
        "{0} branch_pool:1x1:192",
    ],
}
STEM = "Conv2d_1a_3x3:3x3:32:2 Conv2d_2a_3x3:3x3:32:valid Conv2d_2b_3x3:3x3:64 stridedmax Conv2d_3b_1x1:1x1:80 "
STEM += "Conv2d_4a_3x3:3x3:192:valid stridedmax"
TRUNK = [
    *[("Mixed_5b", "5", 32), ("Mixed_5c", "5", 64), ("Mixed_5d", "5", 64), ("Mixed_6a", "6a", 0)],
    *[("Mixed_6b", "6", 128), ("Mixed_6c", "6", 160), ("Mixed_6d", "6", 160), ("Mixed_6e", "6", 192)],
    *[("Mixed_7a", "7a", 0), ("Mixed_7b", "7", "avg"), ("Mixed_7c", "7", "max")],
]


class NaiveInception:
    """Runs the table over a state dict with pytorch-fid's names; `shapes` collects every name and shape that the graph
    asks for."""

    def __init__(self, state: dict[str, torch.Tensor] | None = None):
        self.state = None if state is None else {name: tensor.double() for name, tensor in state.items()}
        self.shapes: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}

    def unit(self, x, name, spec):
        kernel, out, *rest = spec.split(":")
        height, width = map(int, kernel.split("x"))
        stride = 2 if rest == ["2"] else 1
        padding = (0, 0) if rest else ((height - 1) // 2, (width - 1) // 2)
        self.shapes[f"{name}.conv.weight"] = (int(out), x.shape[1], height, width)
        for part in ("weight", "bias", "running_mean", "running_var"):
            self.shapes[f"{name}.bn.{part}"] = (int(out),)
        if self.state is None:  # shapes only, on the meta device
            filters = torch.empty(self.shapes[f"{name}.conv.weight"], device="meta")
            return F.conv2d(x, filters, stride=stride, padding=padding)
        weight, bias, mean, var = (
            self.state[f"{name}.bn.{part}"].view(1, -1, 1, 1)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        y = F.conv2d(x, self.state[f"{name}.conv.weight"], stride=stride, padding=padding)
        return torch.relu((y - mean) / torch.sqrt(var + 0.001) * weight + bias)

    def chain(self, x, text, prefix=""):
        for step in text.split():
            if step == "avg":  # the mean over the pixels that exist
                ones = torch.ones_like(x[:1, :1])
                x = F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(ones, 3, 1, 1)
            elif step == "max":
                x = F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-torch.inf), 3, 1)
            elif step == "stridedmax":
                x = F.max_pool2d(x, 3, 2)
            else:
                x = torch.cat(
                    [self.unit(x, prefix + fork.partition(":")[0], fork.partition(":")[2]) for fork in step.split("|")],
                    1,
                )
        return x

    def __call__(self, x):
        """x: (B, 3, 299, 299) fp64 in [-1, 1]. Returns pool (B, 2048), spatial (B, 2023) and logits (B, 1008)."""
        x = self.chain(x, STEM)
        spatial = None
        for name, block, argument in TRUNK:
            branches = [self.chain(x, branch.format(argument), name + ".") for branch in BLOCKS[block]]
            if name == "Mixed_6d":
                spatial = branches[0].permute(0, 2, 3, 1)[..., :7].reshape(len(x), -1)
            x = torch.cat(branches, 1)
        pool = x.mean((2, 3))
        return pool, spatial, None if self.state is None else pool @ self.state["fc.weight"].T


def inception_features(state: dict[str, torch.Tensor], images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pool, spatial and logits of uint8 images (N, H, W, 3), one image at a time."""
    network = NaiveInception(state)
    results = []
    for image in images:
        pixels = (legacy_resize(image.astype(np.float64), 299) - 128) / 128
        results.append([part.numpy()[0] for part in network(torch.from_numpy(pixels).permute(2, 0, 1)[None])])
    return tuple(np.stack(part) for part in zip(*results))


def random_inception_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under pytorch-fid's names that keep activations of order one through all 94 layers, with batch norms that
    do something."""
    shapes = NaiveInception()
    shapes(torch.zeros(1, 3, 299, 299, device="meta"))
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.shapes.items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("conv.weight"):
            state[name] = values * (2 / values[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = (1 + 0.1 * values).clamp_min(0.5)
        else:  # logits of order one: their features have a mean square of about one
            state[name] = 0.1 * values
    return state
