"""From images to caches: VFM features and composite latents."""
