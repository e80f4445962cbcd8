"""Model types of trained KA models, ``ka_llama`` for ``llama`` and so on: what loads one of them gets KA-attention."""

from __future__ import annotations

from functools import cache
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ka_attention.hf.attach import attach
from ka_attention.hf.attention import NAME, register_attention
from ka_attention.hf.config import KAConfig

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


@cache
def register() -> None:
    """Make ``attn_implementation="ka"`` and the KA model types known to transformers. May be called again."""
    register_attention()
    for family in FAMILIES:
        ka_classes(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]])


def __getattr__(name: str) -> Any:
    """``KALlamaForCausalLM``, ``KALlamaConfig``: the KA class of a class of transformers, where pickle looks for it."""
    base: Any = getattr(transformers, name.removeprefix("KA"), None) if name.startswith("KA") else None
    parents = getattr(base, "__mro__", ())
    if PreTrainedModel in parents and base.can_generate():
        return ka_classes(base)[1]
    if PreTrainedConfig in parents:
        return _config_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def ka_classes(base: Any) -> tuple[Any, Any]:
    """(configuration, model) classes of the KA type of a causal language model class of transformers.

    The model is attached from its ``config.ka_config`` when it is built, so it is a KA model however it is made. The
    Auto classes know the type from then on if they take ``base`` for its configuration; a class of one's own, whose
    configuration is another model's, loads with the class returned here. ValueError if ``base`` is of another kind.
    """
    if base.config_class.model_type.startswith("ka_"):
        return base.config_class, base
    if not base.can_generate():
        raise ValueError(f"base: expected a causal language model, which alone has a KA type, got {base.__name__}")
    Config = _config_class(base.config_class)

    class Model(base):
        config_class = Config

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            if config._attn_implementation not in (None, NAME):
                raise ValueError(
                    f"attn_implementation: {type(self).__name__} runs KA-attention only ({NAME!r}), "
                    f"got {config._attn_implementation!r}; load the model it came from for softmax attention"
                )
            config._attn_implementation = NAME
            super().__init__(config, *args, **kwargs)
            attach(self, KAConfig.of(config))

        def initialize_weights(self) -> None:
            super().initialize_weights()
            # `_init_weights` of the inner model does not know gates; those that were loaded are left as they are.
            for module in self.modules():
                if hasattr(module, "ka_gate"):
                    module.ka_gate.reset_parameters()

    Model.__name__ = Model.__qualname__ = f"KA{base.__name__}"
    _name_weights_alike(Model.__name__, base.__name__)
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(base.config_class, None) is base:
        AutoConfig.register(Config.model_type, Config, exist_ok=True)
        AutoModelForCausalLM.register(Config, Model, exist_ok=True)
    return Config, Model


@cache
def _config_class(base: Any) -> Any:
    """One for all model classes of a configuration class, as a model type can have one only."""
    register_attention()  # for models that were unpickled

    class Config(base):
        model_type = "ka_" + base.model_type
        ka_config: dict | None = None

    Config.__name__ = Config.__qualname__ = f"KA{base.__name__}"
    _name_weights_alike(Config.model_type, base.model_type)
    return Config


def _name_weights_alike(made: str, base: str) -> None:
    # Some families name their weights differently in files (GPT-NeoX: embed_out for lm_head).
    if (names := get_checkpoint_conversion_mapping(base)) is not None:
        register_checkpoint_conversion_mapping(made, names, overwrite=True)
