"""Evaluation as OpenAI's guided-diffusion evaluator defines it: FID, sFID, Inception Score, precision, recall; KID and
FD-DINOv2 beside."""

from sfd_fast.config.evaluation import EvaluatorConfig
from sfd_fast.evaluation.evaluator import METRICS, Evaluator
from sfd_fast.evaluation.features import FeatureExtractor, Features, build_extractor
from sfd_fast.evaluation.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from sfd_fast.evaluation.statistics import RunningStatistics, Statistics, load_statistics, save_statistics

__all__ = [
    "METRICS",
    "Evaluator",
    "EvaluatorConfig",
    "FeatureExtractor",
    "Features",
    "RunningStatistics",
    "Statistics",
    "build_extractor",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "load_statistics",
    "precision_recall",
    "save_statistics",
]
