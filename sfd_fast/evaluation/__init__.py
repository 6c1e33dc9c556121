"""Evaluation as OpenAI's guided-diffusion evaluator defines it: FID, sFID, Inception Score, precision, recall; KID and
FD-DINOv2 beside."""

from .evaluate import EvaluateConfig, format_report, run_evaluate
from .evaluator import METRICS, Evaluator, EvaluatorConfig
from .features import FEATURE_KINDS, FeatureExtractor, Features, build_extractor
from .metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from .statistics import RunningStatistics, Statistics, load_statistics, save_statistics

__all__ = [
    "FEATURE_KINDS",
    "METRICS",
    "EvaluateConfig",
    "Evaluator",
    "EvaluatorConfig",
    "FeatureExtractor",
    "Features",
    "RunningStatistics",
    "Statistics",
    "build_extractor",
    "format_report",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "load_statistics",
    "precision_recall",
    "run_evaluate",
    "save_statistics",
]
