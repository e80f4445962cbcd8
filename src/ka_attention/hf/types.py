"""What makes a transformers model a KA model: its class, its configuration's class, and the model type of both.

``KALlamaForCausalLM`` with a ``KALlamaConfig`` of type ``ka_llama`` for ``llama``, and so on. Nothing of it is kept
beside the model: whatever is saved, copied or pickled says what it is, and what loads it gets KA-attention or an error.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ka_attention.hf.attention import NAME, register_attention
from ka_attention.hf.batching import make_manager
from ka_attention.hf.cache.caches import KACache, KAStaticCache
from ka_attention.hf.card import write_card, write_loader
from ka_attention.hf.config import KAConfig
from ka_attention.hf.convolution import KAConvolution
from ka_attention.hf.gates import KAGate
from ka_attention.hf.install import PARTS, install, prepare
from ka_attention.hf.layer import configure
from ka_attention.hf.tensor_parallel import register_styles, with_gates

# The families that the Auto classes know as KA models from the start; `ka_classes` adds any other.
FAMILIES = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
# In config.json every layer is of a type that stock classes do not know: they refuse it, with no need of this package.
_MARK = "ka_"
_PLAIN = "attention"  # of a model whose configuration names no types of layers
# Among the weights, for stock classes that are given a configuration in the place of config.json: they warn of it.
_SIGN = "ka_attention"


@cache
def register() -> None:
    """Make ``attn_implementation="ka"`` and the KA model types known to transformers. May be called again."""
    register_attention()
    register_styles()
    for family in FAMILIES:
        ka_classes(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]])


def __getattr__(name: str) -> Any:
    """``KALlamaForCausalLM``, ``KALlamaConfig``: the KA class of a class of transformers, where files look for it."""
    base: Any = getattr(transformers, name.removeprefix("KA"), None) if name.startswith("KA") else None
    parents = getattr(base, "__mro__", ())
    if PreTrainedModel in parents and base.can_generate():
        return ka_classes(base)[1]
    if PreTrainedConfig in parents:
        return config_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def ka_classes(base: Any) -> tuple[Any, Any]:
    """(configuration, model) classes of the KA type of a causal language model class of transformers.

    The model is attached from its ``config.ka_config`` when it is built, so it is a KA model however it is made. The
    Auto classes know the type from then on if they take ``base`` for its configuration; a class of one's own, whose
    configuration is another model's, loads with the class returned here. ValueError if ``base`` is of another kind.
    """
    if issubclass(base, KAModel):
        return base.config_class, base
    if not base.can_generate():
        raise ValueError(f"base: expected a causal language model, which alone has a KA type, got {base.__name__}")
    return config_class(base.config_class), model_class(base)


class KAModel:
    """What a KA model does otherwise than the model that it was made of: mixed into its class, in front."""

    ka_base: Any  # the class of transformers
    config: Any
    config_class: Any
    can_generate: Any
    modules: Any
    named_modules: Any
    state_dict: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config.get_text_config(decoder=True), KATyped):
            raise ValueError(
                f"config: {type(self).__name__} is made from a {self.config_class.__name__}, got a "
                f"{type(config).__name__}, with which it would be a softmax model"
            )
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        ka, parts = prepare(self, KAConfig.of(config))
        self.config.ka_config = ka.to_dict()
        install(parts)
        configure(self, ka)

    def initialize_weights(self) -> None:
        super().initialize_weights()  # type: ignore[misc]
        # `_init_weights` of the inner model does not know these; those that were loaded are left as they are.
        for module in self.modules():
            if isinstance(module, KAGate | KAConvolution):
                module.reset_parameters()

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        _refuse_other_attention(attn_implementation)

    def init_continuous_batching(
        self, generation_config: Any = None, continuous_batching_config: Any = None, workload_hints: Any = None
    ) -> Any:
        """The manager behind ``generate_batch``, which serves many requests at once from a paged cache of K and U."""
        if not self.can_generate() or not isinstance(self.config, KATyped):
            raise ValueError(f"model: only a causal language model by itself is served in batches, not {type(self)}")
        if (kept := getattr(self, "_cached_continuous_batching_manager", None)) is not None:
            kept.switch_to_cb_friendly_attn(self)
            return kept
        return make_manager(self, generation_config, continuous_batching_config, workload_hints)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, length: int
    ) -> None:
        """What ``generate`` calls to make a cache: a KA cache where it would have made its own, under any name."""
        given = {name for name, value in model_kwargs.items() if value is not None}
        kind = generation_config.cache_implementation
        had_cache = any(isinstance(value, Cache) for value in model_kwargs.values())
        if not had_cache and generation_config.use_cache is not False and kind not in _KINDS:
            raise ValueError(f"cache_implementation: with KA-attention expected 'dynamic' or 'static', got {kind!r}")
        made_by = super()._prepare_cache_for_generation  # type: ignore[misc]
        made_by(generation_config, model_kwargs, mode, batch_size, length)
        made = [name for name, value in model_kwargs.items() if isinstance(value, Cache) and name not in given]
        if had_cache or generation_config.use_cache is False:
            return
        if len(made) != 1:
            raise RuntimeError(
                f"generate of transformers {transformers.__version__} makes its cache in a way that is not known here: "
                "pass a KACache yourself, or install a version that ka-attention names"
            )
        if kind == "static":
            length = max(length, getattr(generation_config, "max_cache_len", None) or 0)
            model_kwargs[made[0]] = KAStaticCache(self.config, length)
        else:
            cache = model_kwargs[made[0]] = KACache(self.config)
            if generation_config.is_assistant:
                cache.activate_past_recording()

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        if not self.can_generate() or not isinstance(self.config, KATyped):
            raise ValueError(
                "save_pretrained: only a causal language model by itself has a KA type, this would load as a softmax "
                "model; use ka_attention.hf.save_adapter, and save the rest after detach"
            )
        ka, unused = KAConfig.of(self.config), []
        for name, module in self.named_modules():
            if "ka_layer" in vars(module):
                unused += [f"{name}.{part}." for part in PARTS if part not in ka.parts(module.layer_idx)]
            if not isinstance(gate := getattr(module, "ka_gate", None), KAGate | None):
                raise ValueError(
                    f"save_pretrained: the gate of layer {module.layer_idx} is wrapped in a {type(gate).__name__} and "
                    "would be lost on loading; unwrap it (PEFT: merge_and_unload), or use ka_attention.hf.save_adapter"
                )
        given = self.state_dict() if state_dict is None else state_dict
        state_dict = {key: tensor for key, tensor in given.items() if not key.startswith(tuple(unused))}
        state_dict[_SIGN] = torch.ones(1, dtype=torch.uint8)
        return super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + _SIGN, None)  # a Trainer that resumes reads the file of weights by itself
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        write_card(working_dir, self.config)  # push_to_hub wrote one of its own over it
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        if dropped := sorted(name for name in info["unexpected_keys"] if any(f".{part}." in name for part in PARTS)):
            raise ValueError(f"the checkpoint holds {', '.join(dropped)}, for which its ka_config has no place")
        return (model, info) if output_loading_info else model

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Nothing: remote code would copy this file into folders that are saved, which `write_loader` does better."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (_new, (model_class, self.ka_base), *tuple(super().__reduce_ex__(protocol))[2:])


class KATyped:
    """What the configuration of a KA model does otherwise than the one it was made of: mixed into its class."""

    ka_base: Any

    def __post_init__(self, **kwargs: Any) -> None:
        kinds = kwargs.pop("layer_types", None) or getattr(self, "layer_types", None)
        if kinds and all(str(kind).startswith(_MARK) for kind in kinds):
            kinds = [str(kind).removeprefix(_MARK) for kind in kinds]
            kinds = None if set(kinds) == {_PLAIN} else kinds
        if kinds or hasattr(self, "layer_types"):
            self.layer_types = kinds
        super().__post_init__(**kwargs)  # type: ignore[misc]

    @property
    def _attn_implementation(self) -> str:
        return NAME

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        _refuse_other_attention(value)

    _attn_implementation_internal = _attn_implementation

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:
        plan = self.__dict__.get("base_model_tp_plan", getattr(self.ka_base, "base_model_tp_plan", None))
        return with_gates(plan, self)

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str] | None) -> None:
        self.__dict__["base_model_tp_plan"] = plan  # transformers 5.17, for tied embeddings

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that stock classes refuse, which do not know the types of its layers."""
        _tell_peft(self.ka_base.model_type)
        found = super().to_dict()  # type: ignore[misc]
        count = getattr(self, "num_hidden_layers", 0)
        found["layer_types"] = [_MARK + kind for kind in found.get("layer_types") or [_PLAIN] * count]
        if (names := self._auto_map()) is not None:
            found["auto_map"] = names
        return found

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        if (names := self._auto_map()) is not None:
            write_loader(save_directory, [name.split(".")[1] for name in names.values()])
        write_card(save_directory, self)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def _auto_map(self) -> dict[str, str] | None:
        """Where the Auto classes find the KA classes in a folder; None for a model that they do not know at all."""
        model: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(self.ka_base, None)
        if model is None:
            return None
        return {
            "AutoConfig": f"modeling_ka.KA{self.ka_base.__name__}",
            "AutoModelForCausalLM": f"modeling_ka.KA{model.__name__}",
        }

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Nothing, as for `KAModel`."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (_new, (config_class, self.ka_base), *tuple(super().__reduce_ex__(protocol))[2:])


_KINDS = (None, "dynamic", "dynamic_full", "static")


@cache
def model_class(base: Any) -> Any:
    """The KA class of any model class of transformers; only those of causal language models are saved and loaded."""
    Config = config_class(base.config_class)
    body = {"config_class": Config, "ka_base": base, "__module__": __name__}
    body["_keys_to_ignore_on_load_unexpected"] = [*(base._keys_to_ignore_on_load_unexpected or ()), f"^{_SIGN}$"]
    Model = type(base)(f"KA{base.__name__}", (KAModel, base), body)
    _name_weights_alike(Model.__name__, base.__name__)
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(base.config_class, None) is base:
        AutoConfig.register(Config.model_type, Config, exist_ok=True)
        AutoModelForCausalLM.register(Config, Model, exist_ok=True)
    return Model


@cache
def config_class(base: Any) -> Any:
    """One for all model classes of a configuration class, as a model type can have one only."""
    register_attention()  # for models that were unpickled
    _let_trainers_resume()

    class Config(KATyped, base):
        model_type = "ka_" + base.model_type
        ka_base = base
        ka_config: dict | None = None

    Config.__name__ = Config.__qualname__ = f"KA{base.__name__}"
    _name_weights_alike(Config.model_type, base.model_type)
    return Config


@cache
def _let_trainers_resume() -> None:
    """Let the base class of configurations, of which no model is made, read those of KA models.

    A Trainer that resumes asks it for the version of transformers that wrote the checkpoint, and nothing else. From
    5.17 to 5.24 there is no public way to allow a type of layers, or to read a checkpoint by another class. The list is
    private to huggingface_hub's `strict`; where it is missing, a Trainer that resumes raises as for any unknown type.
    """
    checks: Any = getattr(PreTrainedConfig, "__class_validators__", [])  # subclasses have their own

    def allowing(check: Any) -> Any:
        def validate_layer_type(config: Any) -> None:
            kinds = getattr(config, "layer_types", None)
            if not kinds or not all(str(kind).startswith(_MARK) for kind in kinds):
                check(config)

        return validate_layer_type

    checks[:] = [allowing(check) if check.__name__ == "validate_layer_type" else check for check in checks]


def _new(make: Any, base: Any) -> Any:
    """An empty object of the KA class of ``base``, for pickle."""
    kind = make(base)
    return kind.__new__(kind)


def _refuse_other_attention(wanted: Any) -> None:
    if isinstance(wanted, dict):
        wanted = wanted.get("", NAME)
    if wanted not in (None, NAME):
        raise ValueError(
            f"attn_implementation: a KA model runs {NAME!r} only, got {wanted!r}; call ka_attention.hf.detach first, "
            "or load the model it came from for softmax attention"
        )


def _name_weights_alike(made: str, base: str) -> None:
    # Some families name their weights differently in files (GPT-NeoX: embed_out for lm_head).
    if (names := get_checkpoint_conversion_mapping(base)) is not None:
        register_checkpoint_conversion_mapping(made, names, overwrite=True)


def _tell_peft(model_type: str) -> None:
    """PEFT looks up which modules it adapts by model type, for which it asks the configuration for a dictionary."""
    constants = sys.modules.get("peft.utils.constants")
    for name, targets in vars(constants).items() if constants else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(targets, dict) and model_type in targets:
            targets.setdefault("ka_" + model_type, targets[model_type])
