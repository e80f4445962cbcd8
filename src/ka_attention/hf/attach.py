"""Attach KA-attention to a transformers model, and detach it again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ka_attention.hf.config import KAConfig
from ka_attention.hf.install import Adapters, install, prepare, remove
from ka_attention.hf.layer import configure
from ka_attention.hf.support import text_config
from ka_attention.hf.types import KAModel, KATyped, config_class, model_class, register

M = TypeVar("M", bound=nn.Module)
_OWN = ("architectures", "auto_map", "ka_config")  # of a KA configuration alone


def attach(model: M, ka: KAConfig | None = None, adapter: Adapters | None = None) -> M:
    """Make ``model`` a KA model, in place, and return it; with learned gates if ``ka`` asks for them.

    Args:
        model: a causal language model of transformers, loaded or built from a configuration.
        ka: the settings; by default KA-attention in every layer.
        adapter: modules that map A ``[B, Hq, T, D]`` to what later tokens read in V's place: a mapping from, or a
            function of, the index of a KA layer. With one, several new tokens are computed one after another.

    From then on ``generate`` makes a KA cache, and the model is of a class and type of its own (``KALlamaForCausalLM``,
    ``ka_llama``, for ``llama``), with a configuration of its own, with which it saves and loads as a KA model. Other
    models around a decoder (classifiers, vision and language, the bare ``LlamaModel``) have no type to load with, and
    ``save_pretrained`` refuses: use `save_adapter`. Raises ValueError for models that are not supported, layers that do
    not exist, a model that is attached already, or is wrapped, compiled or sharded; then nothing has changed.
    """
    register()
    ka, parts = prepare(_whole(model), ka or KAConfig(), adapter)
    kind: Any = type(model)
    before: Any = model.config
    config = copy.deepcopy(before)
    pairs = [(before, config)]
    if (text := text_config(model)) is not before:
        pairs.append((text, config.get_text_config(decoder=True)))
    decoder: Any = pairs[-1][1]
    decoder.__class__ = config_class(decoder.__class__)
    decoder.ka_config = ka.to_dict()
    own_class = model_class(kind)

    # Nothing from here on fails.
    install(parts)
    model._ka_before = _Before(pairs, model)  # type: ignore[assignment]
    model.__class__ = own_class
    _set_configs(model, pairs)
    configure(model, ka)
    return model


def detach(model: M) -> M:
    """Undo `attach`, in place: gates and adapters are dropped, the model computes bit for bit what it did before.

    What was changed in its configuration meanwhile stays. ValueError for a model that is not attached, or that was made
    as a KA model (``KALlamaForCausalLM``).
    """
    if not isinstance(model, KAModel):
        raise ValueError("model: it is not attached" + (" itself, a part of it is" if is_attached(model) else ""))
    if type(model) is not model_class(model.ka_base):
        raise ValueError(f"model: it has become a {type(model).__name__} since it was attached, undo that first")
    before = model.__dict__.get("_ka_before")
    if before is None:
        raise ValueError(
            f"model: {type(model).__name__} was made as a KA model, there is nothing to go back to; "
            "load the model it came from for softmax attention"
        )
    remove(model)
    del model._ka_before
    before.carry_over()
    _set_configs(model, [(now, then) for then, now in before.pairs])
    model.__class__ = model.ka_base
    before.restore(model)
    return model


def is_attached(model: nn.Module) -> bool:
    """Whether ``model``, or one that it is wrapped around, is a KA model."""
    return any(isinstance(module, KAModel) for module in model.modules())


@contextmanager
def use(model: M, ka: KAConfig | None = None, *, adapter: Adapters | None = None, **settings: Any) -> Iterator[M]:
    """``with use(model, layers=…, gate=…, window=…):`` is `attach` now and `detach` at the end.

    Give a KAConfig or its fields as keywords. ``gate`` may also be a number, or one a head: fixed gates.
    """
    if ka is not None and settings:
        raise ValueError(f"ka: give a KAConfig or its fields, not both, got {sorted(settings)} besides")
    if isinstance(settings.get("gate"), int | float | tuple | list):
        settings["gate_init"] = settings.pop("gate")
    attach(model, ka or KAConfig(**settings), adapter)
    try:
        yield model
    finally:
        detach(model)


def _whole(model: Any) -> Any:
    """``model``, if it is a model of transformers that nothing is wrapped around and no part of a KA model."""
    if is_attached(model):
        raise ValueError("model: it is attached already, call ka_attention.hf.detach first")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model: expected a model of transformers, got a {type(model).__name__}; attach first, then compile, wrap "
            "(PEFT, DDP, FSDP) or shard it"
        )
    if isinstance(text_config(model), KATyped):
        raise ValueError(f"model: this {type(model).__name__} is a part of a KA model already")
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise ValueError(f"model: {type(model).__name__} is sharded (DTensor); attach first, then shard it")
    return model


class _Before:
    """What a model had before `attach`."""

    def __init__(self, pairs: list[tuple[Any, Any]], model: Any) -> None:
        self.pairs = pairs
        self.values = [copy.deepcopy(vars(now)) for _, now in pairs]  # to tell what was changed since
        self.name = model.__dict__.get("name_or_path")
        self.guarded: tuple[Any, Any] | None = None
        if self.name:  # PEFT stores it as the model to load an adapter onto, which is no longer right
            model.name_or_path = f"{self.name} with KA-attention: load that, attach it, then PeftModel.from_pretrained"
        if not model.can_generate() and model.base_model is model:
            shared = pairs[-1][0]
            self.guarded = shared, type(shared)
            shared.__class__ = _guard(type(shared))

    def carry_over(self) -> None:
        """Bring what was changed in the KA configurations into those from before."""
        for (then, now), values in zip(self.pairs, self.values, strict=True):
            for name, value in vars(now).items():
                own = name in _OWN or isinstance(value, PreTrainedConfig)
                if not own and (name not in values or values[name] != value):
                    setattr(then, name, value)

    def restore(self, model: Any) -> None:
        if self.name:
            model.name_or_path = self.name
        if self.guarded is not None:
            shared, kind = self.guarded
            shared.__class__ = kind


def _guard(base: Any) -> Any:
    """The class of a configuration that a bare decoder shared with the model around it, which is not to be saved."""

    class Guarded(base):
        def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
            raise ValueError(
                "save_pretrained: the decoder within this model is attached by itself, this would load as a softmax "
                "model; detach it and attach the whole model"
            )

        def __reduce_ex__(self, protocol: Any) -> Any:
            _, _, *state = super().__reduce_ex__(protocol)
            return (base.__new__, (base,), *state)  # a copy is shared with no model

    Guarded.__name__, Guarded.__qualname__ = base.__name__, base.__qualname__
    return Guarded


def _set_configs(model: Any, pairs: list[tuple[Any, Any]]) -> None:
    """Give the model and its parts the configurations (old, new) in the place of those they have."""
    for module in model.modules():
        for old, new in pairs:
            if getattr(module, "config", None) is old:
                module.config = new
