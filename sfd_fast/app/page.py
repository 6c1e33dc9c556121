"""The page in the browser, the one file that imports Gradio: fields on the left, scrubber and pictures on the right.

Nothing is asked of another host: usage reports are off, fonts are the system's, and the page forbids the browser the
rest (Content-Security-Policy).
"""

import os
import time
from types import ModuleType
from typing import Any

from sfd_fast.app.choice import as_command, as_python
from sfd_fast.app.studio import SOLVERS, Studio
from sfd_fast.app.view import CSS, moment_html

POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
MAX_WAITING = 16
"""clicks that may wait for their turn; one is drawn at a time"""
MAX_SESSIONS = 32
FORGET_S = 3600
"""trajectories that nobody looked at for so long are forgotten"""
FONTS = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
PAGE_CSS = CSS + ".gradio-container { max-width: 1320px !important; }"


def load_gradio() -> ModuleType:
    """Gradio with its usage reports off. Raises ImportError that names the command which installs it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f"the page needs Gradio ({error}): pip install 'sfd-fast[app]'") from None
    return gradio


class OwnHostOnly:
    """An ASGI layer that forbids the browser every request to another host."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        async def with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"content-security-policy", POLICY)]
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)


def launch(studio: Studio, *, host: str, port: int, block: bool = True) -> tuple[Any, str]:
    """Serves the page; port 0: the first free one from 7860 on. Returns Gradio's page and its address.

    block: return only when the page is closed. Raises OSError where the port is taken.
    """
    gr = load_gradio()
    from starlette.middleware import Middleware  # comes with Gradio

    page = build(studio)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    _, address, _ = page.launch(
        server_name=host, server_port=port or None, prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False,
        footer_links=[], css=PAGE_CSS, theme=gr.themes.Base(**FONTS), run_history=False,
        state_session_capacity=MAX_SESSIONS, app_kwargs={"middleware": [Middleware(OwnHostOnly)]},
    )  # fmt: skip
    print(f"open {address} (Ctrl-C ends it)", flush=True)
    if block:
        page.block_thread()
    return page, address


def build(studio: Studio) -> Any:
    """The page as Gradio Blocks."""
    gr = load_gradio()
    end = 1 + studio.pipeline.delta_t
    with gr.Blocks(title="sfd app", analytics_enabled=False) as page:
        drawn = gr.State(time_to_live=FORGET_S)
        gr.Markdown(heading(studio))
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                inputs, draw = fields(gr, studio)
            with gr.Column(scale=3):
                status = gr.Markdown("Choose a class and press **Draw**.", elem_id="status")
                tau = gr.Slider(
                    0, end, value=end, step=0.01, elem_id="tau",
                    label="tau: from noise (left) through the three stages to images (right)",
                )  # fmt: skip
                moment = gr.HTML(elem_id="moment")
                with gr.Accordion("Copy as Python / command", open=False, elem_id="copy"):
                    python = gr.Code(language="python", label="Python", elem_id="python", interactive=False)
                    command = gr.Code(language="shell", label="command", elem_id="command", interactive=False)

        def on_draw(*values: Any) -> tuple:
            start = time.monotonic()
            try:
                choice = studio.chosen(*values[:7], values[7:])
                tracks = studio.draw(choice)
            except ValueError as error:
                return (gr.skip(), f"**This cannot be drawn:** {error}.", *[gr.skip()] * 4)
            captions = [f"{i}: {studio.names[label]}" for i, label in enumerate(choice.labels)]
            each, seconds = " of each model" if len(tracks) > 1 else "", time.monotonic() - start
            line = f"{len(captions)} images{each} with seed {choice.seed} in {seconds:.1f} s"
            code = as_python(choice, studio.origin), as_command(choice, studio.origin)
            return (tracks, captions), line, end, moment_html(tracks, captions, 1.0), *code

        def on_scrub(drawn: tuple | None, tau: float) -> str:
            return moment_html(*drawn, tau / end) if drawn else ""

        private = {"api_visibility": "private"}
        outputs = [drawn, status, tau, moment, python, command]
        draw.click(on_draw, inputs, outputs, concurrency_id="draw", show_progress_on=[status], **private)
        tau.input(
            on_scrub, [drawn, tau], moment, concurrency_id="scrub", trigger_mode="always_last",
            show_progress="hidden", **private,
        )  # fmt: skip
    return page


def heading(studio: Studio) -> str:
    delta_t = studio.pipeline.delta_t
    lead = f"semantics lead texture by {delta_t:g}" if delta_t else "semantics and texture share one clock"
    return f"### Semantics-First Diffusion: `{studio.name}`, {lead}, on {studio.origin.device}"


def fields(gr: ModuleType, studio: Studio) -> tuple[list, Any]:
    """The fields in the order of Studio.chosen, and the button."""
    pipeline, guidance = studio.pipeline, studio.pipeline.guidance
    batch, (texture, semantic) = pipeline.micro_batch_size, guidance.scales
    labels = gr.Dropdown(
        [(name, i) for i, name in enumerate(studio.names)], value=[0], multiselect=True, label="class",
        info="several: images take them in turn", elem_id="labels",
    )  # fmt: skip
    count = gr.Slider(1, batch, value=min(8, batch), step=1, label="images", elem_id="count")
    seed = gr.Number(0, label="seed", elem_id="seed", info="seed and image number fix the noise")
    with gr.Row():
        narrow = {"min_width": 90}
        solver = gr.Dropdown(list(SOLVERS), value=pipeline.sampler.solver, label="solver", elem_id="solver", **narrow)
        steps = gr.Number(pipeline.sampler.num_inference_steps, label="steps", elem_id="steps", **narrow)
    mode = gr.Radio(studio.guidance_modes, value=guidance.mode, label="guidance", elem_id="mode")
    with gr.Group():
        apart = gr.Checkbox(
            texture != semantic, label="own scales for texture and semantics", elem_id="apart",
            visible=pipeline.delta_t > 0,
        )  # fmt: skip
        bounds = {"minimum": 0, "maximum": 5, "step": 0.05}
        scale = gr.Slider(
            value=texture, label="guidance scale", visible=texture == semantic, elem_id="scale", **bounds
        )
        tex = gr.Slider(value=texture, label="texture scale", visible=texture != semantic, **bounds)
        sem = gr.Slider(value=semantic, label="semantic scale", visible=texture != semantic, **bounds)
    apart.change(
        lambda on: (gr.update(visible=not on), gr.update(visible=on), gr.update(visible=on)), apart, [scale, tex, sem],
        show_progress="hidden", queue=False, api_visibility="private",
    )  # fmt: skip
    draw = gr.Button("Draw", variant="primary", elem_id="draw")
    return [labels, count, seed, solver, steps, mode, apart, scale, tex, sem], draw
