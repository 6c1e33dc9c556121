"""How generated images are judged."""

from dataclasses import dataclass
from typing import Literal

from sfd_fast.config.checks import Count, FilePath, Settings

FeatureKind = Literal["inception", "dinov2", "digits"]
Metric = Literal["fid", "sfid", "inception_score", "precision", "recall", "kid"]


@dataclass(frozen=True, kw_only=True)
class EvaluatorConfig(Settings):
    """What to compare with and how.

    Defaults from OpenAI's guided-diffusion evaluator (evaluator.py); KID's from torch-fidelity.
    """

    reference: FilePath
    """npz with images (arr_0) and/or statistics (mu, sigma, mu_s, sigma_s), or a folder of images"""
    features: FeatureKind = "inception"
    """inception; dinov2: FD-DINOv2; digits: 8 x 8 pixels of small images, no weights needed"""
    weights: FilePath | None = None
    """inception: file, or "download" (default: torch.hub's cache); dinov2: folder or hub name"""
    metrics: tuple[Metric, ...] = ()
    """of fid, sfid, inception_score, precision, recall, kid; empty: all that features and reference allow"""
    batch_size: Count = 64
    num_workers: Count = 4
    """threads that decode the images of a folder"""
    device: str = "auto"
    """auto: this process's GPU where there is one, else the CPU"""
    split_size: Count = 5000
    """images per split of the Inception Score"""
    num_neighbors: Count = 3
    """k of precision and recall"""
    num_reference: Count = 10_000
    """reference images for precision, recall and KID; OpenAI's batches hold 10,000. Samples are used all"""
    distance_precision: Literal["auto", "float16", "float32"] = "auto"
    """of precision and recall; float16: as the evaluator's TensorFlow graph rounds, whose figures are the published
    ones; auto: that for inception, float32 for the others"""
    kid_num_subsets: Count = 100
    kid_subset_size: Count = 1000
    seed: int = 0
    """of KID's subsets"""
    save_statistics: FilePath | None = None
    """where to write the reference's statistics, to be given as reference later"""
    overwrite: bool = False
    """write over files that another program made"""
    allow_size_mismatch: bool = False
    """compare although samples and reference differ in height or width"""
    progress: bool = True
