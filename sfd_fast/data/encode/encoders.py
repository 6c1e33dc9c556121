"""From a batch of pixels to the rows of a shard: VFM features, and texture and semantic latents.

Letters: B images, S pixels, N tokens, F feature width, C_t and C_s channels, h, w latent grid.
"""

import torch
from sfd_kernels import feature_alignment_loss
from torch import Tensor, nn

from sfd_fast.data.cache.layout import FEATURES, FLIP, SEMANTIC, TEXTURE, TEXTURE_LOGVAR, TEXTURE_MEAN
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

    kind = "features"
    parts = ("vfm",)
    """options of the command that name encoders"""

    def __init__(self, vfm: VFM, *, dtype: torch.dtype, flip: bool):
        self.vfm, self.dtype, self.flip = vfm, dtype, flip

    def settings(self) -> dict:
        return {"vfm": module_digest(self.vfm), "vfm_width": self.vfm.width, "vfm_grid": self.vfm.grid_size}

    def layout(self) -> Layout:
        """dtype and shape of one sample of every tensor."""
        shape = (self.vfm.width, self.vfm.grid_size, self.vfm.grid_size)
        return {FEATURES + suffix: (self.dtype, shape) for suffix in suffixes(self.flip)}

    def __call__(self, images: Tensor, ids: Tensor) -> tuple[Rows, Tensor | None]:
        """images: (B, S, S, 3) uint8 on the encoder's device; ids: (B,) image numbers.  Returns (rows, None)."""
        views = {suffix: flip_images(images) if suffix else images for suffix in suffixes(self.flip)}
        return {FEATURES + suffix: feature_map(self.vfm.features(view)) for suffix, view in views.items()}, None


class LatentEncoder:
    """Texture and semantic latents of both flips under the released names, optionally with the features.

    Texture: a sample of the codec's posterior by (seed, image number), or with posterior="moments" its mean and
    logvar (latents_mean, latents_logvar), from which the loader samples anew at every visit. Semantics: a sample of
    SemVAE's posterior, or none where semvae is None. A mirrored image draws its own noise. vfm: needed for SemVAE and
    for features.
    """

    kind = "latents"

    def __init__(
        self,
        vfm: VFM | None,
        semvae: nn.Module | None,
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
        self.parts = ("texture_codec", *(["vfm"] if vfm else []), *(["semvae"] if semvae else []))
        """options of the command that name encoders"""
        if semvae is not None and semvae.config.feature_channels != vfm.width:
            raise ValueError(
                f"the SemVAE was trained on features of width {semvae.config.feature_channels}, the VFM gives "
                f"{vfm.width}: use the VFM that SemVAE was trained with"
            )

    def settings(self) -> dict:
        return {
            "vfm": module_digest(self.vfm) if self.vfm else None,
            "vfm_width": self.vfm.width if self.vfm else None,
            "semvae": module_digest(self.semvae) if self.semvae else None,
            "texture_codec": module_digest(self.codec),
            "posterior": self.posterior,
            "features": self.features,
            "seed": self.seed,
        }

    def layout(self) -> Layout:
        """dtype and shape of one sample of every tensor."""
        of_texture = (TEXTURE_MEAN, TEXTURE_LOGVAR) if self.posterior == "moments" else (TEXTURE,)
        layout: Layout = {}
        for suffix in suffixes(self.flip):
            for name in of_texture:
                layout[name + suffix] = (self.dtype, (self.codec.latent_channels, self.grid, self.grid))
            if self.semvae is not None:
                layout[SEMANTIC + suffix] = (self.dtype, (self.semvae.config.latent_channels, self.grid, self.grid))
            if self.features:
                layout[FEATURES + suffix] = (torch.float16, (self.vfm.width, self.grid, self.grid))
        return layout

    @torch.no_grad()
    def __call__(self, images: Tensor, ids: Tensor) -> tuple[Rows, Tensor | None]:
        """images: (B, S, S, 3) uint8 on the encoders' device; ids: (B,) int64 numbers of the images.

        Returns the rows of the shard in their stored dtype, and the mean token cosine between y* and its
        reconstruction from the stored semantic latent, (B,) per flip in turn: (1, B) or (2, B); None without SemVAE.
        """
        rows: Rows = {}
        cosines = []
        for suffix in suffixes(self.flip):
            texture_noise, semantic_noise = (
                (random_numbers.CODEC_NOISE, random_numbers.SEMANTIC_FLIP_NOISE)
                if suffix
                else (random_numbers.TEXTURE_POSTERIOR, random_numbers.SEMANTIC_POSTERIOR)
            )
            view = flip_images(images) if suffix else images
            texture = self.codec.encode(to_codec(view))
            if self.posterior == "moments":
                rows[TEXTURE_MEAN + suffix], rows[TEXTURE_LOGVAR + suffix] = texture
            else:
                rows[TEXTURE + suffix] = self._sample(*texture, ids, texture_noise)
            if self.vfm is None:
                continue
            features = self.vfm.features(view)
            if self.features:
                rows[FEATURES + suffix] = feature_map(features)
            if self.semvae is not None:
                mean, logvar = (feature_map(part) for part in self.semvae.encode(features))
                semantic = self._sample(mean, logvar, ids, semantic_noise).to(self.dtype)
                rows[SEMANTIC + suffix] = semantic
                decoded = self.semvae.decode(feature_tokens(semantic.float()))
                cosines.append(1 - feature_alignment_loss(decoded.float(), features.float())[1])
        return rows, torch.stack(cosines) if cosines else None

    def _sample(self, mean: Tensor, logvar: Tensor, ids: Tensor, number: int) -> Tensor:
        """A sample of the posterior by (seed, image number) and a number of random_numbers.py."""
        eps = noise(ids.to(mean.device), mean.shape[1:], self.seed, number)
        return sample_posterior(mean.float(), logvar.float(), eps)


def suffixes(flip: bool) -> tuple[str, ...]:
    """What the names of a shard's tensors end with: nothing, and the mark of mirrored images."""
    return ("", FLIP) if flip else ("",)
