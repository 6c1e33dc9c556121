"""Per-channel statistics of latents: one exact streaming pass, and the normalisation that they define.

Letters: B batch, C channels (C_t texture, C_s semantic), H, W.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sfd_fast.diffusion.transport import join_latents
from sfd_fast.files.atomic import write_atomically
from sfd_fast.files.digest import tensors_digest
from sfd_fast.files.home import with_home
from sfd_fast.files.messages import first_line
from sfd_fast.files.torch_file import read_torch_file

TEXTURE_FILE = "latents_stats.pt"
SEMANTIC_FILE = "latents_sv_stats.pt"
FILES = (TEXTURE_FILE, SEMANTIC_FILE)
PARTS = ("texture", "semantic")
VALUES = ("texture_mean", "texture_std", "semantic_mean", "semantic_std")


@dataclass(frozen=True)
class ChannelMoments:
    """Count, mean and centred sum of squares of every channel, in float64: statistics that can be merged."""

    count: int
    mean: Tensor
    """(C,) float64"""
    squares: Tensor
    """sum of (x - mean)^2, (C,) float64"""

    @classmethod
    def empty(cls, channels: int) -> "ChannelMoments":
        return cls(0, torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))

    @classmethod
    def of(cls, values: Tensor, *, chunk: int | None = None) -> "ChannelMoments":
        """Of values (B, C, ...): float64 throughout, `chunk` samples at a time (None: about 32 MiB of them).

        Raises ValueError naming the first sample that holds NaN or infinity.
        """
        chunk = chunk or chunk_of(values)
        moments = cls.empty(values.shape[1])
        for start in range(0, len(values), chunk):
            part = values[start : start + chunk].double().flatten(2)
            mean = part.mean(dim=(0, 2))
            squares = (part - mean[:, None]).square().sum(dim=(0, 2))
            if not torch.isfinite(squares).all():
                raise ValueError(f"sample {start + first_not_finite(part)} holds NaN or infinity")
            moments = moments.merge(cls(part.shape[0] * part.shape[2], mean, squares))
        return moments

    def merge(self, other: "ChannelMoments") -> "ChannelMoments":
        """Moments of both sets together. Source: Chan, Golub, LeVeque (1979)."""
        count = self.count + other.count
        if count == 0:
            return self
        difference = other.mean - self.mean
        return ChannelMoments(
            count,
            self.mean + difference * (other.count / count),
            self.squares + other.squares + difference.square() * (self.count * other.count / count),
        )

    def with_noise(self, logvar: Tensor) -> "ChannelMoments":
        """Moments of mean + exp(logvar / 2) * standard normal, from those of the means.

        The squares grow by sum(exp(logvar)). logvar: (B, C, ...), of the same samples.
        """
        variance, chunk = torch.zeros_like(self.squares), chunk_of(logvar)
        for start in range(0, len(logvar), chunk):
            variance += logvar[start : start + chunk].double().exp().flatten(2).sum(dim=(0, 2))
        return ChannelMoments(self.count, self.mean, self.squares + variance)

    def std(self) -> Tensor:
        """Unbiased standard deviation, (C,) float64."""
        return (self.squares / max(self.count - 1, 1)).sqrt()

    def to_json(self) -> dict:
        """Exact: Python writes the shortest decimal that reads back as the same float64."""
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    @classmethod
    def from_json(cls, content: dict) -> "ChannelMoments":
        return cls(
            content["count"],
            torch.tensor(content["mean"], dtype=torch.float64),
            torch.tensor(content["squares"], dtype=torch.float64),
        )


def chunk_of(values: Tensor) -> int:
    """Samples of (B, ...) that are about 32 MiB in float64; a function of their shape alone."""
    return max(1, 2**22 * len(values) // max(values.numel(), 1))


def first_not_finite(values: Tensor) -> int | None:
    """The first sample of (B, ...) that holds NaN or infinity, None where all are finite."""
    if not values.is_floating_point():
        return None
    chunk = chunk_of(values)
    for start in range(0, len(values), chunk):
        bad = torch.isfinite(values[start : start + chunk]).flatten(1).all(dim=1).logical_not().nonzero()
        if len(bad):
            return start + int(bad[0])
    return None


def merge_all(parts: Iterable[ChannelMoments]) -> ChannelMoments:
    """Moments of all parts in the order given: the same order gives the same bits, whoever computed the parts."""
    merged = None
    for part in parts:
        merged = part if merged is None else merged.merge(part)
    if merged is None:
        raise ValueError("statistics of no data")
    return merged


def multiply_add(latents: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """latents * scale + shift in one pass, in place where they are float32. (B, C, H, W), any float; returns float32.

    scale, shift: (C, H, W) float32: CPU kernels are three times slower where these are broadcast over H and W.
    """
    if latents.device.type == "cpu":  # CUDA converts within the kernel, the CPU would in a copy of each operand
        latents = latents.float()
    return torch.addcmul(shift, latents, scale, out=latents if latents.dtype == torch.float32 else None)


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of every channel of both parts; z' = (z - mean) / std * multiplier.

    A model decodes with the statistics it was trained with: they belong to the cache (docs/METHOD.md 2).
    """

    texture_mean: Tensor
    """(C_t,) float32, as all four"""
    texture_std: Tensor
    semantic_mean: Tensor
    semantic_std: Tensor
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        for name in VALUES:
            values = torch.as_tensor(getattr(self, name), dtype=torch.float32).flatten()
            if not torch.isfinite(values).all():
                raise ValueError(f"latent statistics: {name} holds NaN or infinity; compute them again")
            if name.endswith("std") and (values <= 0).any():
                channel = int((values <= 0).nonzero()[0])
                raise ValueError(
                    f"latent statistics: {name} of channel {channel} is {float(values[channel])}, must be above 0: a "
                    "constant channel cannot be standardised"
                )
            object.__setattr__(self, name, values)
        for part in PARTS:
            mean, std = getattr(self, f"{part}_mean"), getattr(self, f"{part}_std")
            if mean.shape != std.shape:
                raise ValueError(f"latent statistics: {len(mean)} {part} means but {len(std)} standard deviations")
        if not self.multiplier > 0:
            raise ValueError(f"latent multiplier {self.multiplier} must be above 0")

    @classmethod
    def identity(cls, texture_channels: int, semantic_channels: int) -> "LatentStatistics":
        """Statistics that change nothing."""
        t, s = texture_channels, semantic_channels
        like = {"dtype": torch.float32}
        return cls(torch.zeros(t, **like), torch.ones(t, **like), torch.zeros(s, **like), torch.ones(s, **like))

    @classmethod
    def from_moments(
        cls, texture: ChannelMoments, semantic: ChannelMoments, multiplier: float = 1.0
    ) -> "LatentStatistics":
        return cls(texture.mean, texture.std(), semantic.mean, semantic.std(), multiplier)

    def to_json(self) -> dict:
        """Exact: a float32 is written as the shortest decimal that reads back as the same float64."""
        return {name: getattr(self, name).tolist() for name in VALUES} | {"multiplier": self.multiplier}

    @classmethod
    def from_json(cls, content: dict) -> "LatentStatistics":
        values = {name: torch.tensor(content[name], dtype=torch.float32) for name in VALUES}
        return cls(**values, multiplier=content["multiplier"])

    def standardising(self, *, texture: bool, semantic: bool) -> "LatentStatistics":
        """These, but 0 and 1 for the part that is not standardised."""
        plain = LatentStatistics.identity(self.texture_channels, self.semantic_channels)
        kept = {"texture": texture, "semantic": semantic}
        return replace(self, **{name: getattr(plain, name) for name in VALUES if not kept[name.split("_")[0]]})

    def digest(self) -> str:
        """16 hexadecimal digits that differ where any value does."""
        values = {name: getattr(self, name) for name in VALUES}
        multiplier = torch.tensor(self.multiplier, dtype=torch.float64)
        return tensors_digest(values | {"multiplier": multiplier})[:16]

    @property
    def texture_channels(self) -> int:
        return len(self.texture_mean)

    @property
    def semantic_channels(self) -> int:
        return len(self.semantic_mean)

    def to(self, device: torch.device | str) -> "LatentStatistics":
        return replace(self, **{name: getattr(self, name).to(device) for name in VALUES})

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), each (C, 1, 1) over the composite, with z' = z * scale + shift."""
        std = join_latents(self.texture_std[None], self.semantic_std[None])[0]
        mean = join_latents(self.texture_mean[None], self.semantic_mean[None])[0]
        scale = self.multiplier / std.double()
        shift = -mean.double() * scale
        return scale.float().view(-1, 1, 1), shift.float().view(-1, 1, 1)

    def normalize(self, texture: Tensor, semantic: Tensor) -> Tensor:
        """The normalised composite. texture (B, C_t, H, W), semantic (B, C_s, H, W).  Returns (B, C, H, W) float32."""
        self._check(texture, "texture")
        self._check(semantic, "semantic")
        latents = join_latents(texture, semantic)
        scale, shift = (value.to(latents.device) for value in self.scale_and_shift())
        return torch.addcmul(shift, latents, scale)

    def denormalize_texture(self, texture: Tensor) -> Tensor:
        """z = z' * std / multiplier + mean, ready for the texture decoder. (B, C_t, H, W), same shape back."""
        self._check(texture, "texture")
        return self._denormalize(texture, self.texture_mean, self.texture_std)

    def denormalize_semantic(self, semantic: Tensor) -> Tensor:
        """z = z' * std / multiplier + mean, ready for the SemVAE decoder. (B, C_s, H, W), same shape back."""
        self._check(semantic, "semantic")
        return self._denormalize(semantic, self.semantic_mean, self.semantic_std)

    def _denormalize(self, values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        scale = (std / self.multiplier).to(values.device).view(-1, 1, 1)
        return torch.addcmul(mean.to(values.device).view(-1, 1, 1), values, scale)

    def _check(self, values: Tensor, part: str) -> None:
        expected = len(getattr(self, f"{part}_mean"))
        if values.shape[1] != expected:
            raise ValueError(
                f"{part} latents have {values.shape[1]} channels, their statistics {expected}: latents and "
                "statistics belong to different caches"
            )

    @with_home
    def save(self, folder: str | Path) -> None:
        """Writes latents_stats.pt and latents_sv_stats.pt in the released form, atomically.

        Raises OSError naming the file that cannot be written, ValueError before anything is written where a file that
        is there already is of other channels.
        """
        values = ((self.texture_mean, self.texture_std), (self.semantic_mean, self.semantic_std))
        files = {Path(folder, name): pair for name, pair in zip(FILES, values) if len(pair[0])}
        for path, (mean, _) in files.items():
            try:
                found = len(read_statistics(path)["mean"])
            except (FileNotFoundError, ValueError):  # nothing, or nothing of use
                continue
            if found != len(mean):
                raise ValueError(
                    f"{path} holds statistics of {found} channels, the new ones are of {len(mean)}: it belongs to "
                    "other latents and is left alone; move it away to write new ones"
                )
        for path, (mean, std) in files.items():
            # through memory: saved to a file, the archive would carry the temporary name
            content = io.BytesIO()
            torch.save({"mean": mean.cpu().view(1, -1, 1, 1), "std": std.cpu().view(1, -1, 1, 1)}, content)
            write_atomically(path, content.getbuffer())

    @classmethod
    @with_home
    def load(
        cls, folder: str | Path, multiplier: float = 1.0, *, semantic: bool = True, pca_channels: int = 0
    ) -> "LatentStatistics":
        """Reads the statistics beside a cache (the released form); semantic=False: of a cache without latents_sv.

        pca_channels: of PCA features, which stand before latents_sv and are never normalised (mean 0, std 1).
        Raises FileNotFoundError naming the file and how to make it, ValueError naming a damaged or foreign one.
        """
        texture = read_statistics(Path(folder, TEXTURE_FILE))
        parts = [{"mean": torch.zeros(pca_channels).float(), "std": torch.ones(pca_channels).float()}]
        parts += [read_statistics(Path(folder, SEMANTIC_FILE))] if semantic else []
        mean, std = (torch.cat([part[name] for part in parts]) for name in ("mean", "std"))
        return cls(texture["mean"], texture["std"], mean, std, multiplier)

    def divided_at(self, texture_channels: int) -> "LatentStatistics":
        """The same composite with another number of its channels called texture."""
        mean, std = (torch.cat([getattr(self, f"{part}_{kind}") for part in PARTS]) for kind in ("mean", "std"))
        count = texture_channels
        return LatentStatistics(mean[:count], std[:count], mean[count:], std[count:], self.multiplier)


def read_statistics(path: Path) -> dict[str, Tensor]:
    """{"mean", "std"}, each (C,), of one file of statistics in the released form.

    Raises FileNotFoundError naming the file and how to make it, ValueError naming a damaged or foreign one.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: compute it with `sfd inspect {path.parent} --statistics`, or copy it from where the "
            "cache was made"
        )
    try:
        content = read_torch_file(path)
        return {name: content[name].flatten().float() for name in ("mean", "std")}
    except Exception as error:  # torch, pickle and zipfile raise many kinds
        raise ValueError(
            f"{path} is truncated, damaged or no file of statistics ({first_line(error)}): copy it again, or compute "
            f"it with `sfd inspect {path.parent} --statistics`"
        ) from error
