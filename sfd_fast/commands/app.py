"""`sfd app`: a page in the browser to play with a model."""

from dataclasses import dataclass

from sfd_fast.config import SamplingPrecision, Settings, require
from sfd_fast.config.checks import FilePath


@dataclass(frozen=True)
class AppConfig(Settings):
    """Options of the page."""

    model: FilePath = ""
    """pipeline folder or hub name; a run of `sfd train`; or the folder of a network that `sfd convert` wrote"""
    twin: FilePath = ""
    """pipeline folder of another model of the same latents, drawn beside it from the same noise; for example a
    synchronous one (delta_t 0)"""
    guide: FilePath = ""
    """guide network's folder, where the pipeline has none or another is wanted"""
    texture_codec: FilePath = ""
    """texture codec's folder or file, where the model names none or another is wanted"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 serves every machine that reaches this one"""
    port: int = 0
    """port to listen on; 0: the first free one from 7860 on"""
    batch: int = 16
    """images of one click at most"""
    precision: SamplingPrecision = "auto"
    """of the networks; auto: bf16 on a GPU that computes in it, else fp32"""
    device: str = ""
    """cpu, cuda or cuda:N; empty: cuda where there is one, else the CPU"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.batch <= 256, f"batch {self.batch} must be 1 to 256, the images of one click")
        require(0 <= self.port < 65536, f"port {self.port} must be 0 (the first free one from 7860 on) to 65535")


def run_app(config: AppConfig) -> None:
    """Loads the models and serves the page until Ctrl-C.

    Raises ImportError where Gradio is not installed, ValueError and OSError as `sfd sample` does.
    """
    from sfd_fast.app.page import launch, load_gradio

    require(bool(config.model), "model is empty; give a pipeline folder, for example --model runs/demo/model")
    load_gradio()  # before the models, which may take long to load
    from sfd_fast.app.studio import Studio

    studio = Studio(
        config.model, twin=config.twin, guide=config.guide, texture_codec=config.texture_codec,
        batch=config.batch, precision=config.precision, device=config.device,
    )  # fmt: skip
    launch(studio, host=config.host, port=config.port)
