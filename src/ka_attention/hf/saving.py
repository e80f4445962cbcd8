"""Gates and adapters on a base model as a directory of their own: ``ka_config.json`` and ``ka_adapter.safetensors``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ka_attention.hf.attach import M, attach, detach
from ka_attention.hf.config import KAConfig
from ka_attention.hf.gates import KAGate
from ka_attention.hf.support import attention_modules, text_config
from ka_attention.hf.types import KAModel

_CONFIG, _WEIGHTS = "ka_config.json", "ka_adapter.safetensors"
_SHAPE = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim", "vocab_size")


def save_adapter(model: Any, path: str | Path) -> None:
    """Write what makes an attached model a KA model (configuration, gates, adapters) into the directory ``path``.

    The model may be wrapped (PEFT, DDP, compiled); of a sharded one every process calls this, and the first writes.
    ValueError for a model that is not attached, or what could not be loaded again: an adapter without ``spec``, gates
    in a wrapper that is not known, or that are not finite.
    """
    inner = next((m for m in model.modules() if isinstance(m, KAModel)), None)
    if inner is None:
        raise ValueError("model: it is not attached, there is nothing to save")
    ka = KAConfig.of(text_config(inner))
    if lost := [i for i, spec in (ka.adapters or {}).items() if "kind" not in spec]:
        raise ValueError(f"adapter: those of layers {', '.join(lost)} have no `spec` from which they could be rebuilt")
    tensors = {name: t.detach() for name, t in _tensors(inner).items()}
    is_sharded = any(hasattr(t, "full_tensor") for t in tensors.values())
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}
    if is_sharded and torch.distributed.get_rank() != 0:
        return
    for name, t in whole.items():
        _check(name, t, "the model")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in whole.items()}, path / _WEIGHTS)
    description = {"base": _base(inner), "ka_config": ka.to_dict(), "sha256": _checksum(path / _WEIGHTS)}
    (path / _CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: M, path: str | Path) -> M:
    """Attach to ``model`` what `save_adapter` wrote to ``path``, and return the model.

    Load it before the model is wrapped or sharded. ValueError if files are missing or damaged, were made for a model of
    another shape, or do not hold exactly the weights that their configuration asks for; then the model is as it was.
    """
    path = Path(path)
    if missing := [name for name in (_CONFIG, _WEIGHTS) if not (path / name).is_file()]:
        raise ValueError(f"path: {path} is no KA adapter, it has no {' and no '.join(missing)}")
    try:
        description = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
        made_for, ka = dict(description["base"]), KAConfig(**description["ka_config"])
        weights = load_file(path / _WEIGHTS)
        if description["sha256"] != _checksum(path / _WEIGHTS):
            raise ValueError(f"{_WEIGHTS} is not what {_CONFIG} was written for")
    except KeyError as error:
        raise ValueError(f"path: {path} is damaged: {_CONFIG} has no {error}") from error
    except (ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"path: {path} is damaged: {error}") from error
    for name, t in weights.items():
        _check(name, t, path)
    if other := {k: (v, made_for.get(k)) for k, v in _base(model).items() if made_for.get(k) != v}:
        differences = ", ".join(f"{key} {want} there and {have} here" for key, (have, want) in other.items())
        raise ValueError(f"path: the adapter in {path} was made for another model: {differences}")
    attach(model, ka)
    try:
        _load(_tensors(model), weights, path)
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


def _tensors(model: Any) -> dict[str, Tensor]:
    """Gates and adapters of a KA model by name, as if nothing were wrapped around them."""
    names = {module: name for name, module in model.named_modules()}
    ka, found = KAConfig.of(text_config(model)), {}
    for module in attention_modules(model):
        for kind in ka.parts(module.layer_idx):
            part: Any = getattr(module, kind, None)
            if hasattr(part, "modules_to_save"):  # PEFT keeps the part as it was beside the one that it trains
                part = part.modules_to_save[part.active_adapter]
            if kind == "ka_gate" and not isinstance(part, KAGate | None):
                raise ValueError(f"model: the gate of layer {module.layer_idx} is in a {type(part).__name__}")
            for name, tensor in part.state_dict().items() if part is not None else ():
                found[f"{names[module]}.{kind}.{name}"] = tensor
    return found


def _check(name: str, t: Tensor, source: Any) -> None:
    if not t.is_floating_point():
        raise ValueError(f"path: {name} must hold floating-point numbers, {source} has {t.dtype}")
    if not t.isfinite().all():
        raise ValueError(f"path: {name} must be finite, {source} has NaN or infinity")


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _base(model: Any) -> dict[str, Any]:
    """What a model must have in common with the one that an adapter was made for."""
    text = text_config(model)
    shape = {name: getattr(text, name, None) for name in _SHAPE}
    return {"model_type": text.model_type.removeprefix("ka_"), **shape}
