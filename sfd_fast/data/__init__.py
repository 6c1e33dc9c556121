"""From images to latents: readers, preparation, shards and the loader."""
