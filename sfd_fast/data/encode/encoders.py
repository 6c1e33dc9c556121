"""From a batch of pixels to the rows of a shard: VFM features, and latents of both streams.

Letters: B images, S pixels, N tokens, F feature width, C_t and C_s channels, h, w latent grid.
"""

from collections.abc import Callable

import torch
from sfd_kernels import feature_alignment_loss
from torch import Tensor, nn

from sfd_fast.data.images.decode import flip_images, to_codec
from sfd_fast.diffusion import random_numbers
from sfd_fast.diffusion.posterior import sample_posterior
from sfd_fast.diffusion.transport import feature_map, feature_tokens, noise
from sfd_fast.files.digest import module_digest
from sfd_fast.models.vfm import VFM

Rows = dict[str, Tensor]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class FeatureEncoder:
    """VFM features of both flips: feats_dino and feats_dino_flip (B, F, h, w), the released layout."""

    def __init__(self, vfm: VFM, *, dtype: torch.dtype, flip: bool):
        self.vfm, self.dtype, self.flip = vfm, dtype, flip

    def parts(self) -> tuple[str, ...]:
        """Options of the command that name encoders."""
        return ("vfm",)

    def settings(self) -> dict:
        return {"vfm": module_digest(self.vfm), "vfm_width": self.vfm.width, "vfm_grid": self.vfm.grid_size}

    def layout(self) -> Layout:
        """dtype and shape of one sample of every tensor."""
        shape = (self.vfm.width, self.vfm.grid_size, self.vfm.grid_size)
        names = ("feats_dino", "feats_dino_flip") if self.flip else ("feats_dino",)
        return dict.fromkeys(names, (self.dtype, shape))

    def __call__(self, images: Tensor, ids: Tensor) -> tuple[Rows, Tensor | None]:
        """images: (B, S, S, 3) uint8 on the encoder's device; ids: (B,) image numbers.  Returns (rows, None)."""
        rows = {"feats_dino": feature_map(self.vfm.features(images))}
        if self.flip:
            rows["feats_dino_flip"] = feature_map(self.vfm.features(flip_images(images)))
        return rows, None


class LatentEncoder:
    """Latents of both streams and both flips under the released names, optionally with the features.

    Texture: a sample of the codec's posterior by (seed, image number), or with posterior="moments" its mean and
    logvar (latents_mean, latents_logvar), from which the loader samples anew at every visit. Semantics: a sample of
    SemVAE's posterior. A mirrored image draws its own noise.
    """

    def __init__(
        self,
        vfm: VFM,
        semvae: nn.Module,
        codec: nn.Module,
        *,
        image_size: int,
        dtype: torch.dtype,
        flip: bool,
        posterior: str,
        features: bool,
        seed: int,
    ):
        self.vfm, self.semvae, self.codec = vfm, semvae, codec
        self.dtype, self.flip, self.posterior, self.features, self.seed = dtype, flip, posterior, features, seed
        self.grid = image_size // codec.downsampling
        if semvae.config.feature_channels != vfm.width:
            raise ValueError(
                f"the SemVAE was trained on features of width {semvae.config.feature_channels}, the VFM gives "
                f"{vfm.width}: use the VFM that SemVAE was trained with"
            )

    def parts(self) -> tuple[str, ...]:
        """Options of the command that name encoders."""
        return ("vfm", "semvae", "texture_codec")

    def settings(self) -> dict:
        return {
            "vfm": module_digest(self.vfm),
            "vfm_width": self.vfm.width,
            "semvae": module_digest(self.semvae),
            "texture_codec": module_digest(self.codec),
            "posterior": self.posterior,
            "features": self.features,
            "seed": self.seed,
        }

    def layout(self) -> Layout:
        """dtype and shape of one sample of every tensor."""
        texture = (self.codec.latent_channels, self.grid, self.grid)
        layout: Layout = {}
        for suffix in ("", "_flip") if self.flip else ("",):
            if self.posterior == "moments":
                layout[f"latents_mean{suffix}"] = layout[f"latents_logvar{suffix}"] = (self.dtype, texture)
            else:
                layout[f"latents{suffix}"] = (self.dtype, texture)
            semantic = (self.semvae.config.latent_channels, self.grid, self.grid)
            layout[f"latents_sv{suffix}"] = (self.dtype, semantic)
            if self.features:
                layout[f"feats_dino{suffix}"] = (torch.float16, (self.vfm.width, self.grid, self.grid))
        return layout

    @torch.no_grad()
    def __call__(self, images: Tensor, ids: Tensor) -> tuple[Rows, Tensor]:
        """images: (B, S, S, 3) uint8 on the encoders' device; ids: (B,) int64 numbers of the images.

        Returns the rows of the shard in their stored dtype, and the mean token cosine between y* and its
        reconstruction from the stored semantic latent, (B,) per flip in turn: (B,) or (2, B).
        """
        rows: Rows = {}
        cosines = []
        plain = (random_numbers.TEXTURE_POSTERIOR, random_numbers.SEMANTIC_POSTERIOR)
        mirrored = (random_numbers.CODEC_NOISE, random_numbers.SEMANTIC_FLIP_NOISE)
        for suffix, numbers in (("", plain), ("_flip", mirrored)) if self.flip else (("", plain),):
            view = flip_images(images) if suffix else images
            texture = self.codec.encode(to_codec(view))
            if self.posterior == "moments":
                rows[f"latents_mean{suffix}"], rows[f"latents_logvar{suffix}"] = texture
            else:
                rows[f"latents{suffix}"] = self._sample(*texture, ids, numbers[0])
            features = self.vfm.features(view)
            mean, logvar = (feature_map(part) for part in self.semvae.encode(features))
            semantic = self._sample(mean, logvar, ids, numbers[1]).to(self.dtype)
            rows[f"latents_sv{suffix}"] = semantic
            decoded = self.semvae.decode(feature_tokens(semantic.float()))
            cosines.append(1 - feature_alignment_loss(decoded.float(), features.float())[1])
            if self.features:
                rows[f"feats_dino{suffix}"] = feature_map(features)
        return rows, torch.stack(cosines)

    def _sample(self, mean: Tensor, logvar: Tensor, ids: Tensor, stream: int) -> Tensor:
        """mean + exp(logvar / 2) * noise(seed, image number)."""
        eps = noise(ids.to(mean.device), mean.shape[1:], self.seed, stream)
        return sample_posterior(mean.float(), logvar.float(), eps)


Encoder = Callable[[Tensor, Tensor], tuple[Rows, Tensor | None]]
