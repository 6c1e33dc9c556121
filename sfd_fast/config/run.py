"""How a run is watched and kept: nothing here changes what is computed, so all of it may change when a run goes on."""

from dataclasses import dataclass
from typing import Annotated

from sfd_fast.config.checks import Count, FilePath, Natural, NotNegative, Positive, Range, Settings, require
from sfd_fast.config.evaluation import FeatureKind

PREEMPTED = 75
"""exit code of a run that was asked to stop and goes on when started again (EX_TEMPFAIL)"""


@dataclass(frozen=True)
class RunConfig(Settings, section="run", may_change=True):
    """Where a run lies, and what it logs, draws, judges and keeps."""

    out: FilePath = "runs/train"
    log_every: Count = 50
    validate_every: Natural = 5_000
    sample_every: Natural = 10_000
    """sample grids into TensorBoard; 0 never"""
    num_sample_images: Count = 16
    """images of a sample grid"""
    eval_every: Natural = 0
    """judge generated images as `sfd evaluate` does; 0 never"""
    eval_images: Annotated[int, Range(2)] = 10_000
    """images drawn for it, with the averaged weights, the classes in turn; FID falls as they grow: 50,000 are usual"""
    eval_reference: FilePath = ""
    """npz with images or statistics, or a folder of images"""
    eval_features: FeatureKind = "inception"
    eval_weights: FilePath = ""
    """of the features; empty: their default place (see `sfd evaluate --weights`)"""
    checkpoint_every: Count = 5_000
    keep_checkpoints: Natural = 3
    """the newest so many; 0: all of them"""
    verify: bool = True
    """compare every file of a checkpoint with its SHA-256 before it is resumed"""
    spike_factor: Positive = 10.0
    """a gradient norm above this multiple of its running median is reported"""
    tensorboard: bool = True
    peak_tflops: NotNegative = 0.0
    """of one device in the run's precision: MFU is logged against it; 0 logs TFLOP/s alone"""
    profile_steps: Natural = 0
    """steps recorded by torch.profiler into <out>/profile; 0 none"""
    profile_start: Natural = 10
    """the first recorded step of a run or continuation, counted from its start"""
    nvtx: bool = False
    """NVTX ranges for data, step, validation and checkpoints, for Nsight Systems"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.eval_every == 0 or bool(self.eval_reference),
            "run.eval_every is set, but run.eval_reference is empty: give an npz with images or statistics, or a "
            "folder of images, to compare with",
        )
