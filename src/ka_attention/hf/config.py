"""Which layers of a transformers model use KA-attention, and how: the small dictionary kept in ``config.ka_config``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

GateKind = Literal["fixed", "head", "token"]


@dataclass(frozen=True)
class KAConfig:
    """KA-attention settings of one model.

    Args:
        layers: indices of the KA layers; None means every layer, "sliding" those that the model's own ``layer_types``
            call so (Gemma 3). The others stay the model's own softmax attention.
        pattern: "3:1" for three KA layers, then one softmax layer, and again from there; in the place of ``layers``.
        window: a KA layer attends to the last ``window`` tokens, itself included; None means all of them. A tuple
            names one for each KA layer, from the first to the last.
        gate: "fixed" (the number below), "head" (one learned gate per query head) or "token" (learned, by content).
        gate_init: the fixed gate, or the value at which a learned gate starts. 0 is softmax attention, 1 is
            KA-attention. A tuple names one for each query head.
        gate_range: the interval that gates are kept in; (-1, 1) allows signed gates.
        output_gate: True multiplies what each attention layer computes by silu(W_g x) before its output projection, x
            being the layer's input and W_g learned; in softmax layers too. "ka" does so in the KA layers alone.
        convolution: what the projections to queries, keys and values give is convolved over so many tokens, itself
            included, each channel apart; in softmax layers too. Its learned weights start at random, for a model that
            is trained from the start; in a trained one begin with ``ka_convolution.identity_()`` of each module.
        adapters: for layers with an adapter (index as a string), what it is rebuilt from: ka_attention.hf.adapters.
    """

    layers: tuple[int, ...] | Literal["sliding"] | None = None
    window: int | tuple[int | None, ...] | None = None
    gate: GateKind = "fixed"
    gate_init: float | tuple[float, ...] = 1.0
    gate_range: tuple[float, float] = (0.0, 1.0)
    adapters: dict[str, dict[str, Any]] | None = None
    pattern: str | None = None
    output_gate: bool | Literal["ka"] = False
    convolution: int | None = None

    def __post_init__(self) -> None:
        # JSON turns tuples into lists: restore them, so that a configuration read back compares equal.
        for name in ("layers", "window", "gate_init", "gate_range"):
            if isinstance(getattr(self, name), list | range):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.layers not in (None, "sliding") and not _all(_is_index, self.layers):
            raise ValueError(f"layers: expected None, 'sliding' or indices of layers, got {self.layers!r}")
        if self.pattern is not None:
            if _counts(self.pattern) is None:
                raise ValueError(
                    f"pattern: expected None or a text like '3:1' (KA layers : softmax layers), got {self.pattern!r}"
                )
            if self.layers is not None:
                raise ValueError(f"layers, pattern: expected one of the two, got {self.layers!r} and {self.pattern!r}")
        windows = self.window if isinstance(self.window, tuple) and self.window else (self.window,)
        if not all(w is None or (_is_index(w) and w) for w in windows):
            raise ValueError(
                f"window: expected None, an integer >= 1 or a tuple of them, one a KA layer, got {self.window!r}"
            )
        if self.gate not in ("fixed", "head", "token"):
            raise ValueError(f"gate: expected 'fixed', 'head' or 'token', got {self.gate!r}")
        init = self.gate_init
        starts: tuple[Any, ...] = init if isinstance(init, tuple) and init else (init,)
        if not _all(_is_number, starts) or not _all(_is_number, self.gate_range) or len(self.gate_range) != 2:
            raise ValueError(
                "gate_init, gate_range: expected a number, or one a head, and a pair of numbers, "
                f"got {init!r} and {self.gate_range!r}"
            )
        low, high = self.gate_range
        if not all(-1.0 <= low <= start <= high <= 1.0 for start in starts):
            raise ValueError(
                f"gate_init: expected a number in gate_range {self.gate_range} within [-1, 1], got {init!r}"
            )
        if self.output_gate not in (True, False, "ka") or not isinstance(self.output_gate, bool | str):
            raise ValueError(f"output_gate: expected True, False or 'ka', got {self.output_gate!r}")
        if self.convolution is not None and not (_is_index(self.convolution) and self.convolution > 1):
            raise ValueError(f"convolution: expected None or an integer >= 2, got {self.convolution!r}")
        specs = {} if self.adapters is None else self.adapters
        if not isinstance(specs, dict) or not all(str(i).isdecimal() and isinstance(x, dict) for i, x in specs.items()):
            raise ValueError(f"adapters: expected None or {{'index of a layer': {{…}}, …}}, got {self.adapters!r}")

    def enabled(self, layer_idx: int) -> bool:
        """Whether layer ``layer_idx`` is a KA layer."""
        if self.pattern is not None:
            of_ka, of_softmax = _counts(self.pattern) or (1, 0)
            return layer_idx % (of_ka + of_softmax) < of_ka
        if isinstance(self.layers, str):
            raise ValueError(f"layers: {self.layers!r} depends on the model, ask KAConfig.of(model.config)")
        return self.layers is None or layer_idx in self.layers

    def caches_outputs(self, layer_idx: int) -> bool:
        """Whether later tokens read outputs in layer ``layer_idx``. With the fixed gate 0 they read values: softmax."""
        is_zero = not any(self.gate_init) if isinstance(self.gate_init, tuple) else self.gate_init == 0
        return not (self.gate == "fixed" and is_zero) and self.enabled(layer_idx)

    def window_of(self, layer_idx: int, own: int | None = None) -> int | None:
        """The window of layer ``layer_idx`` whose model gives it the window ``own``: the narrower of the two."""
        window = self.window
        if window is None or not self.enabled(layer_idx):
            return own
        if isinstance(window, tuple):
            window = window[sum(map(self.enabled, range(layer_idx)))]
        return own if window is None else window if own is None else min(window, own)

    def gates_output(self, layer_idx: int) -> bool:
        """Whether the output of layer ``layer_idx`` is multiplied by silu(W_g x)."""
        return self.output_gate is True or (self.output_gate == "ka" and self.enabled(layer_idx))

    def parts(self, layer_idx: int) -> tuple[str, ...]:
        """What the attention module of layer ``layer_idx`` computes with, by the names of its attributes."""
        is_ka = self.caches_outputs(layer_idx)
        asked = {
            "ka_gate": is_ka and self.gate != "fixed",
            "ka_output_gate": self.gates_output(layer_idx),
            "ka_convolution": self.convolution is not None,
            "ka_adapter": is_ka and str(layer_idx) in (self.adapters or {}),
        }
        return tuple(name for name, wanted in asked.items() if wanted)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary that survives ``config.json``."""
        return asdict(self)

    @classmethod
    def of(cls, model_config: Any) -> KAConfig:
        """The KA configuration of a transformers configuration (the default one where none was set), as `resolve`."""
        stored = getattr(model_config, "ka_config", None) or {}
        if not isinstance(stored, cls):
            if unknown := sorted(set(stored) - set(cls.__dataclass_fields__)):
                raise ValueError(f"ka_config: unknown settings {unknown}, known are {list(cls.__dataclass_fields__)}")
            stored = cls(**stored)
        return stored.resolve(model_config)

    def resolve(self, model_config: Any) -> KAConfig:
        """These settings for one model: "sliding" becomes the indices of its layers. ValueError if they do not fit."""
        count = getattr(model_config, "num_hidden_layers", None)
        ka = self
        if self.layers == "sliding":
            types = getattr(model_config, "layer_types", None) or ()
            sliding = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
            if not sliding:
                raise ValueError("layers: 'sliding' needs a model whose layer_types name sliding layers, got none")
            ka = replace(self, layers=sliding)
        if count is None:
            return ka
        if isinstance(ka.layers, tuple) and (beyond := [i for i in ka.layers if i >= count]):
            raise ValueError(f"layers: the model has the layers 0 to {count - 1}, got {beyond}")
        number = sum(map(ka.enabled, range(count)))
        if isinstance(ka.window, tuple) and len(ka.window) != number:
            raise ValueError(f"window: expected one for each of {number} KA layers, got {len(ka.window)}")
        kinds = getattr(model_config, "layer_types", None) or ()
        for i, kind in enumerate(kinds):
            if kind == "chunked_attention" and ka.window_of(i) is not None:
                raise ValueError(f"window: layer {i} of the model attends in chunks and takes no window")
        heads = getattr(model_config, "num_attention_heads", None)
        if isinstance(ka.gate_init, tuple) and len(ka.gate_init) != heads:
            raise ValueError(f"gate_init: expected one for each of {heads} query heads, got {len(ka.gate_init)}")
        return ka


def _counts(pattern: Any) -> tuple[int, int] | None:
    """(KA layers, softmax layers) of a pattern like "3:1"; None for anything else."""
    parts = pattern.split(":") if isinstance(pattern, str) else []
    if len(parts) != 2 or not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        return None
    return int(parts[0]), int(parts[1])


def _all(is_right: Any, xs: Any) -> bool:
    return isinstance(xs, tuple) and all(map(is_right, xs))


def _is_index(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)
