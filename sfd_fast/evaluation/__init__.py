"""Evaluation as OpenAI's guided-diffusion evaluator defines it: FID, sFID, Inception Score, precision, recall; KID and
FD-DINOv2 beside."""

from sfd_fast.commands.evaluate import EvaluateConfig, format_report, run_evaluate
from sfd_fast.evaluation.evaluator import METRICS, Evaluator, EvaluatorConfig
from sfd_fast.evaluation.features import FEATURE_KINDS, FeatureExtractor, Features, build_extractor
from sfd_fast.evaluation.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from sfd_fast.evaluation.statistics import RunningStatistics, Statistics, load_statistics, save_statistics

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
