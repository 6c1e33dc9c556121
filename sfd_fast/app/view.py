"""What the scrubber shows, as HTML: for each model the stages, and of every image the semantics above the texture."""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from sfd_fast import pictures
from sfd_fast.app.studio import Track

STAGES = (("I", "semantics", "#7c6fd6"), ("II", "both", "#3a9c8f"), ("III", "texture", "#d98a3d"))
SMALL = 96
"""pictures below so many pixels are enlarged with their pixels visible"""
CSS = """
.tracks { display: flex; gap: 28px; flex-wrap: wrap; }
.track { flex: 1 1 380px; }
.track h4 { margin: 0 0 6px; }
.stages { display: flex; position: relative; height: 24px; border-radius: 6px; overflow: hidden; }
.stages span { color: white; font-size: 12px; line-height: 24px; text-align: center; white-space: nowrap;
               overflow: hidden; }
.stages i { position: absolute; top: 0; bottom: 0; width: 4px; margin-left: -2px; background: #111; }
.track p { font-variant-numeric: tabular-nums; font-size: 13px; margin: 6px 0 10px; }
.seeds { display: grid; grid-template-columns: repeat(auto-fill, minmax(92px, 1fr)); gap: 12px; }
.seeds figure { margin: 0; max-width: 256px; }
.seeds img { width: 100%; display: block; margin: 0 0 2px; border-radius: 4px; }
.seeds img.small { image-rendering: pixelated; }
.seeds figcaption { font-size: 12px; text-align: center; opacity: .75; }
"""


def image_tag(picture: np.ndarray, name: str) -> str:
    """A picture (H, W, 3) uint8 inside the page, which the browser asks no server for."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="PNG", compress_level=1)
    small = " small" if max(picture.shape) < SMALL else ""
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img class="{name}{small}" alt="{name}" title="{name}" src="data:image/png;base64,{data}">'


def stage_bar(tau: float, delta_t: float) -> str:
    """The three stages in proportion, and a mark at tau."""
    widths = (delta_t, 1 - delta_t, delta_t)
    parts = "".join(
        f'<span style="flex: {width} 0 0; background: {colour}" title="stage {name}: {what} moves">{name} {what}</span>'
        for (name, what, colour), width in zip(STAGES, widths)
        if width > 0
    )
    mark = 100 * tau / (1 + delta_t)
    return f'<div class="stages">{parts}<i style="left: {mark:.2f}%"></i></div>'


def moment_html(tracks: Sequence[Track], captions: Sequence[str], share: float) -> str:
    """The moment of all images at a share of the way (0 noise, 1 data), the models side by side."""
    sections = []
    for track in tracks:
        moment = track.at(share)
        tau, delta_t = moment.tau, track.delta_t
        clocks = f"semantics at {min(tau, 1.0):.2f}, texture at {max(tau - delta_t, 0.0):.2f}"
        cells = "".join(
            f"<figure>{image_tag(semantic, 'semantics')}{image_tag(texture, 'texture')}"
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            for semantic, texture, caption in zip(moment.semantic, moment.texture, captions)
        )
        sections.append(
            f'<section class="track"><h4>{html.escape(track.title)}</h4>{stage_bar(tau, delta_t)}'
            f'<p class="clocks"><b>{pictures.stage_name(tau, delta_t)}</b> &nbsp; tau {tau:.2f}: {clocks}</p>'
            f'<div class="seeds">{cells}</div></section>'
        )
    return f'<div class="tracks">{"".join(sections)}</div>'
