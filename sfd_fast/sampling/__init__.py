"""From labels to images: guidance, solvers, the sampler, the pipeline and its files."""
