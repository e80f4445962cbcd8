"""Continuous batching of a KA model: transformers' manager with a cache that holds K and U."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from ka_attention.hf.heads import Heads
from ka_attention.hf.layer import Layer
from ka_attention.hf.paged import ARGUMENTS, SLIDING, SMALLEST, KAPagedCache, cache_config, page_name
from ka_attention.hf.preparing import prepare_less
from ka_attention.hf.stopping import Requests, ends_with_any
from ka_attention.hf.support import attention_modules

OF_MAIN_MEMORY = 0.05  # the part of what is free that a cache there takes; on a GPU it is transformers' 0.9


class KABatchingManager(ContinuousBatchingManager):
    """Schedules requests as transformers does; the model keeps its attention and gets a cache of its own size."""

    def __init__(self, model: Any, generation_config: Any, settings: Any, hints: Any) -> None:
        windows, name, settings = windows_of(model), page_name(settings), copy.copy(settings)
        if model.device.type == "cpu" and settings.num_blocks is settings.max_memory_percent is None:
            settings.max_memory_percent = OF_MAIN_MEMORY
        narrow = [window for window in windows if window is not None]
        if len(narrow) == len(windows):  # one page holds what a request keeps
            setattr(settings, name, max(SMALLEST, max(narrow) - 1))
        self.layers = [Layer.of(module) for module in attention_modules(model)]
        self.sized = cache_config(model.config, self.layers, windows, getattr(settings, name))
        self.ka = self.layers[0].ka
        super().__init__(_Sized(model, self.sized), generation_config, settings, hints)  # type: ignore[arg-type]
        if not settings.kv_padding_interval_size:  # lists of blocks have one length: no graph for each number of tokens
            self.continuous_batching_config.kv_padding_interval_size = sys.maxsize
        self.model = model
        self.input_queue = self.requests = Requests(self.input_queue.maxsize)

    def stop_at(self, request_id: str, tokenizer: Any, strings: str | Sequence[str]) -> None:
        """Let the request that will be added by this name end with the token that completes one of the strings."""
        self.requests.conditions[request_id] = ends_with_any(
            tokenizer, [strings] if isinstance(strings, str) else strings
        )

    def switch_to_cb_friendly_attn(self, model: Any, *args: Any) -> None:
        """Nothing, as attention "ka" takes paged caches; ValueError if the model is not what it was made for."""
        whole = model._model if isinstance(model, _Sized) else model
        layer = getattr(attention_modules(whole)[0], "ka_layer", None)
        if getattr(layer, "ka", None) is not self.ka:
            raise ValueError(
                "model: its ka_config is not that of the batching manager it kept, call "
                "destroy_cached_continuous_batching_manager() first"
            )

    def _create_batch_processor(self) -> Any:
        model, before = self.model, self.batch_processor
        self.model = _Sized(model, self.sized)  # type: ignore[assignment]
        try:
            processor = super()._create_batch_processor()
        finally:
            self.model = model
        if model.device.type == "cuda":  # its lists are filled on another stream than batches are copied on
            torch.cuda.synchronize(model.device)
        if processor is before:  # with graphs that read its lists
            return processor
        cache: Any = processor.cache
        KAPagedCache.adopt(cache, self.layers, Heads.of(model.config))
        prepare_less(processor.inputs_and_outputs, cache.groups.values(), model.device)
        return processor


def windows_of(model: Any) -> list[int | None]:
    """How many tokens each layer attends to: the narrower of the model's own window and that of its ``KAConfig``."""
    config, modules = model.config, attention_modules(model)
    own = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["" if own is None else SLIDING] * len(modules)
    found = []
    for module, kind in zip(modules, kinds, strict=True):
        both = (Layer.of(module).window, own if kind == SLIDING else None)
        found.append(min((window for window in both if window is not None), default=None))
    return found


def make_manager(model: Any, generation_config: Any, settings: Any, hints: Any) -> KABatchingManager:
    """The manager that a KA model serves requests with. ValueError for what it does not do."""
    settings = settings or ContinuousBatchingConfig()
    generation_config = copy.deepcopy(generation_config or model.generation_config)
    if generation_config.eos_token_id is None:
        generation_config.eos_token_id = -1  # transformers' sign for none
    _refuse(generation_config, settings)
    check_batching(model)
    return KABatchingManager(model, generation_config, settings, hints)


def _refuse(generation_config: Any, settings: Any) -> None:
    if settings.cpu_offload_space and page_name(settings) == "block_size":
        raise ValueError("cpu_offload_space: a KA model needs transformers 5.18 for it, leave it out")
    names = [
        name for name in ("varlen_compile_config", "decode_compile_config") if getattr(settings, name, None) is not None
    ]
    names += ["default_compile_level"] * bool(getattr(settings, "default_compile_level", 0))
    names += ["compile_config"] * (getattr(generation_config, "compile_config", None) is not None)
    if getattr(generation_config, "stop_strings", None):
        raise ValueError(
            "stop_strings: a batch has no tokenizer, use stop_at of the manager that init_continuous_batching gives"
        )
    if names:
        raise ValueError(f"{names[0]}: a KA model runs continuous batching without compilation, leave it out")


def check_batching(model: Any) -> None:
    """ValueError, with the reason, for a KA model that continuous batching does not serve."""
    layers = [Layer.of(module) for module in attention_modules(model)]
    cache_config(model.config, layers, windows_of(model), 1)
    if getattr(model, "_device_mesh", None) is not None:
        raise ValueError("model: a KA model runs continuous batching on one device, this one is split over several")
    if any(layer.group is not None for layer in layers):
        raise ValueError("model: sequence_parallel is for training, end it with sequence_parallel(model, None)")
    _check_path(model)


class _ReachedError(Exception):
    pass


class _Probe(KAPagedCache):
    """A paged cache that tells when attention looks at it."""

    def __init__(self) -> None:
        pass

    @property
    def ka(self) -> Any:
        raise _ReachedError


@torch.no_grad()
def _check_path(model: Any) -> None:
    """ValueError for a model that does not hand what its ``forward`` is given on to attention: it forgets the past."""
    one = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)  # to make one looks at data
    arguments = {"use_cache": False, "cache": _Probe(), **dict.fromkeys(ARGUMENTS, one)}
    reason: Exception | None = None
    try:
        model(input_ids=one, position_ids=one, attention_mask=seen, **arguments)
    except _ReachedError:
        return
    except (AttributeError, TypeError) as error:
        reason = error
    raise ValueError(
        f"model: {type(model).__name__} of transformers {transformers.__version__} does not hand a paged cache to its "
        "attention, use generate"
    ) from reason


class _Sized:
    """A model whose configuration is the one that its cache is sized by, and settings not given are chosen by."""

    def __init__(self, model: Any, config: Any) -> None:
        self._model, self.config = model.eval(), config

    def eval(self) -> _Sized:
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
