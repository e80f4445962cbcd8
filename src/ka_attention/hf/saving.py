"""Gates and adapters on a base model as a directory of their own: ``ka_config.json`` and ``ka_adapter.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ka_attention.hf.attach import attach, detach, is_attached
from ka_attention.hf.config import KAConfig
from ka_attention.hf.support import text_config

_CONFIG, _WEIGHTS = "ka_config.json", "ka_adapter.safetensors"
_PARTS = (".ka_gate.", ".ka_output_gate.", ".ka_adapter.")
_SHAPE = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim", "vocab_size")


def save_adapter(model: Any, path: str | Path) -> None:
    """Write what makes an attached model a KA model (configuration, gates, adapters) into the directory ``path``.

    ValueError for a model that is not attached, or an adapter that could not be rebuilt (without ``spec``).
    """
    if not is_attached(model):
        raise ValueError("model: it is not attached, there is nothing to save")
    ka = KAConfig.of(text_config(model))
    if lost := [i for i, spec in (ka.adapters or {}).items() if "kind" not in spec]:
        raise ValueError(f"adapter: those of layers {', '.join(lost)} have no `spec` from which they could be rebuilt")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().contiguous() for name, t in _weights(model).items()}, path / _WEIGHTS)
    description = {"base": _base(model), "ka_config": ka.to_dict()}
    (path / _CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: Any, path: str | Path) -> Any:
    """Attach to ``model`` what `save_adapter` wrote to ``path``, and return the model.

    ValueError if files are missing or damaged, were made for a model of another shape, or do not hold exactly the
    weights that their configuration asks for; then the model is as it was.
    """
    path = Path(path)
    if missing := [name for name in (_CONFIG, _WEIGHTS) if not (path / name).is_file()]:
        raise ValueError(f"path: {path} is no KA adapter, it has no {' and no '.join(missing)}")
    try:
        description = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
        made_for, ka = description["base"], KAConfig(**description["ka_config"])
        weights = load_file(path / _WEIGHTS)
    except (json.JSONDecodeError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"path: {path} is damaged: {error}") from error
    if other := {k: (v, made_for.get(k)) for k, v in _base(model).items() if made_for.get(k) != v}:
        differences = ", ".join(f"{key} {want} there and {have} here" for key, (have, want) in other.items())
        raise ValueError(f"path: the adapter in {path} was made for another model: {differences}")
    attach(model, ka)
    try:
        _load(_weights(model), weights, path)
    except ValueError:
        detach(model)
        raise
    return model


def _load(own: dict[str, Tensor], weights: dict[str, Tensor], path: Path) -> None:
    if own.keys() != weights.keys():
        missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        raise ValueError(
            f"path: the weights in {path} do not fit their configuration: missing {missing}, unknown {unknown}"
        )
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise ValueError(f"path: {name} must be {list(tensor.shape)}, {path} holds {list(weights[name].shape)}")
    for name, tensor in own.items():
        tensor.detach().copy_(weights[name])


def _weights(model: Any) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if any(part in name for part in _PARTS)}


def _base(model: Any) -> dict[str, Any]:
    """What a model must have in common with the one that an adapter was made for."""
    text = text_config(model)
    shape = {name: getattr(text, name, None) for name in _SHAPE}
    return {"model_type": text.model_type.removeprefix("ka_"), **shape}
