"""From caches to batches: order, flips, held-out samples, normalisation, REPA targets."""
