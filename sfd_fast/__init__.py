"""sfd_fast: Semantics-First Diffusion (SFD, arXiv 2512.04926), trained and sampled fast."""

__version__ = "0.1.0"
