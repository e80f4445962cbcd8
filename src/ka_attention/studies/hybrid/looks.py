"""How the arms of the hybrid study look in its figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ka_attention.harness.figures import drawing
from ka_attention.studies.hybrid.models import HybridArm

COLOURS = {  # of mixers, those of the other reports where these have them
    "full": drawing.COLOURS["softmax"],
    "softmax": drawing.COLOURS["softmax, every other layer with a window"],
    "ka": drawing.COLOURS["KA"],
    "conv": "C2",
    "none": "C3",
    "gdn": drawing.COLOURS["DeltaNet"],
    "mamba2": drawing.COLOURS["Mamba-2"],
}
MARKERS: dict[Any, str] = {None: "o", 1: "v", 2: "^", 4: "s", 8: "D", 16: "P", 64: "X"}
FILLS = {(True, False): "full", (False, False): "none", (True, True): "left", (False, True): "bottom"}  # gated, normed
LEGEND_ABOVE = (4.8, 5.2)  # inches
_SIGNS = {1: "▾", 2: "▴", 4: "■", 8: "◆", 16: "✚", 64: "✖"}  # the markers, for captions


def look(each: HybridArm) -> dict[str, Any]:
    """A colour a mixer, a marker a window; hollow without an output gate, half filled with norms on q, k, dashed where
    no layers alternate, dotted and its markers ringed with convolutions on q, k, v."""
    from matplotlib import rcParams

    convolved = each.convolution == "qkv"
    return {
        "color": colour(each),
        "marker": MARKERS.get(each.window, "*"),
        "linestyle": ":" if convolved else "--" if each.pattern == "all" else "-",
        "fillstyle": FILLS[each.output_gate, each.normed],
        **({"markeredgecolor": rcParams["text.color"]} if convolved else {}),
    }


def marks(arms: Iterable[HybridArm]) -> str:
    """For captions: what the markers of these arms mean."""
    arms = list(arms)
    windows = {each.window for each in arms}
    signs = [f"{sign} {window}" for window, sign in _SIGNS.items() if window in windows]
    said = [f"windows: {', '.join(signs)}"] if len(signs) > 1 else []
    said += ["hollow: without output gates"] if len({each.output_gate for each in arms}) > 1 else []
    said += ["half filled: norms on q, k"] if len({each.normed for each in arms}) > 1 else []
    said += ["ringed: conv qkv"] if any(each.convolution == "qkv" for each in arms) else []
    return "; ".join(said)


def colour(each: HybridArm) -> tuple[float, ...]:
    """That of its mixer, lighter where KA's gates start at 0.5 or spread or learn fast, a gated convolution as the
    identity, a convolution stands in front, or queries and keys have biases."""
    from matplotlib.colors import to_rgb

    lighter = 0.5 if each.mixer == "conv" and each.start != "drawn" else {0.5: 0.45, "spread": 0.7}.get(each.start, 0.0)
    lighter = lighter if each.gate_rate == 1 else 0.2 + lighter / 2
    if each.convolution == "front" or each.bias:
        lighter = 0.5
    return tuple(1 - (1 - part) * (1 - lighter) for part in to_rgb(COLOURS[each.mixer]))


def axes(ax: Any, x: str, y: str = "validation loss (nats)") -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    handles, labels = ax.get_legend_handles_labels()
    once = dict(zip(reversed(labels), reversed(handles), strict=True))
    columns = 1 + (sum(sorted(map(len, once))[-2:]) <= 80)  # as many letters fit side by side
    ax.figure.legend(once.values(), once.keys(), loc="outside upper center", ncols=columns, fontsize=7)
