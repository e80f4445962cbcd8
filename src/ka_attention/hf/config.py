"""Which layers of a transformers model use KA-attention, and how: the small dictionary kept in ``config.ka_config``."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from torch.compiler import is_dynamo_compiling

GateKind = Literal["fixed", "head", "token"]


@dataclass(frozen=True)
class KAConfig:
    """KA-attention settings of one model.

    layers:     indices of the KA layers; None means every layer. The others stay the model's own softmax attention.
    window:     a KA layer attends to the last ``window`` tokens, itself included; None means all of them.
    gate:       "fixed" (the number below), "head" (one learned gate per query head) or "token" (learned, by content).
    gate_init:  the fixed gate, or the value at which a learned gate starts. 0 is softmax attention, 1 is KA-attention.
    gate_range: the interval that gates are kept in; (-1, 1) allows signed gates.
    adapters:   for layers with an adapter (index as a string), what it is rebuilt from: see ka_attention.hf.adapters.
    """

    layers: tuple[int, ...] | None = None
    window: int | None = None
    gate: GateKind = "fixed"
    gate_init: float = 1.0
    gate_range: tuple[float, float] = (0.0, 1.0)
    adapters: dict[str, dict[str, Any]] | None = None
    is_plain: ClassVar[bool]

    def __post_init__(self) -> None:
        # JSON turns tuples into lists: restore them, so that a configuration read back compares equal.
        for name in ("layers", "gate_range"):
            if isinstance(getattr(self, name), list | range):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.layers is not None and not (isinstance(self.layers, tuple) and all(map(_is_index, self.layers))):
            raise ValueError(f"layers: expected None or indices of layers, got {self.layers!r}")
        if self.window is not None and not (_is_index(self.window) and self.window):
            raise ValueError(f"window: expected None or an integer >= 1, got {self.window!r}")
        if self.gate not in ("fixed", "head", "token"):
            raise ValueError(f"gate: expected 'fixed', 'head' or 'token', got {self.gate!r}")
        numbers = isinstance(self.gate_range, tuple) and all(map(_is_number, (*self.gate_range, self.gate_init)))
        if not numbers or len(self.gate_range) != 2:
            raise ValueError(
                "gate_init, gate_range: expected a number and a pair of numbers, "
                f"got {self.gate_init!r} and {self.gate_range!r}"
            )
        low, high = self.gate_range
        if not -1.0 <= low <= self.gate_init <= high <= 1.0:
            raise ValueError(
                f"gate_init: expected a number in gate_range {self.gate_range} within [-1, 1], got {self.gate_init!r}"
            )
        specs = {} if self.adapters is None else self.adapters
        if not isinstance(specs, dict) or not all(str(i).isdecimal() and isinstance(x, dict) for i, x in specs.items()):
            raise ValueError(f"adapters: expected None or {{'index of a layer': {{…}}, …}}, got {self.adapters!r}")

        # Plain KA-attention in every layer: nothing else to ask about. An attribute, since layers ask at every step.
        is_plain = (self.layers, self.window, self.gate, self.gate_init) == (None, None, "fixed", 1) and not specs
        object.__setattr__(self, "is_plain", is_plain)

    def enabled(self, layer_idx: int) -> bool:
        """Whether layer ``layer_idx`` is a KA layer."""
        return self.layers is None or layer_idx in self.layers

    def caches_outputs(self, layer_idx: int) -> bool:
        """Whether later tokens read outputs in layer ``layer_idx``. With the fixed gate 0 they read values: softmax."""
        return (self.gate_init != 0 or self.gate != "fixed") and self.enabled(layer_idx)

    def window_of(self, layer_idx: int, own: int | None = None) -> int | None:
        """The window of layer ``layer_idx`` whose model gives it the window ``own``: the narrower of the two."""
        if self.window is None or not self.enabled(layer_idx):
            return own
        return self.window if own is None else min(self.window, own)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary that survives ``config.json``."""
        return asdict(self)

    @classmethod
    def of(cls, model_config: Any) -> KAConfig:
        """The KA configuration of a transformers configuration (the default one where none was set)."""
        global _last
        if is_dynamo_compiling():  # a graph would watch `_last`, and does not know the shorter way
            return cls._read(getattr(model_config, "ka_config", None) or {}, model_config)
        try:  # every layer asks at every step: not by way of what transformers does at each access
            stored = object.__getattribute__(model_config, "ka_config") or {}
        except AttributeError:
            stored = {}
        if stored != _last[0]:
            _last = copy.deepcopy(stored), cls._read(stored, model_config)
        return _last[1]

    @classmethod
    def _read(cls, stored: Any, model_config: Any) -> KAConfig:
        if not isinstance(stored, cls):
            if unknown := sorted(set(stored) - set(cls.__dataclass_fields__)):
                raise ValueError(f"ka_config: unknown settings {unknown}, known are {list(cls.__dataclass_fields__)}")
            stored = cls(**stored)
        count = getattr(model_config, "num_hidden_layers", None)
        if count is not None and (beyond := [i for i in stored.layers or () if i >= count]):
            raise ValueError(f"ka_config: the model has the layers 0 to {count - 1}, got layers {beyond}")
        return stored


def _is_index(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


# What `KAConfig.of` found last, and what it says. A copy, so that a change of the original is seen.
_last: tuple[dict[str, Any] | KAConfig, KAConfig] = {}, KAConfig()
