"""Convolutions of a model whose texts are split over processes: it trains as in one process."""

import pytest
import torch
import torch.distributed as dist
from processes import together
from test_sequence_parallel import alone, check_alike, packed
from text_shares import batches
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from ka_attention.hf import KACache, KAConfig, attach, attention_modules, sequence_parallel, share

HYBRID = KAConfig(pattern="3:1", window=4, gate="head", gate_init=0.5, convolution=4)


def make_model(ka=HYBRID):
    """In float64 throughout, with biases of projections: what lies before a text is zeros all the same."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3}
    nothing = {"residual_dropout": 0.0, "embedding_dropout": 0.0, "bos_token_id": None, "eos_token_id": None}
    config = Starcoder2Config(vocab_size=17, num_hidden_layers=4, initializer_range=0.3, **sizes, **nothing)
    model = attach(Starcoder2ForCausalLM(config), ka).double()
    for module in attention_modules(model):
        for projection in (module.q_proj, module.k_proj, module.v_proj):
            torch.nn.init.normal_(projection.bias)
    return model


def work(folder):
    check_alike(make_model, folder, recomputed=[packed])  # messages are sent again
    group, batch = dist.group.WORLD, next(batches())
    model = sequence_parallel(make_model(), group)
    with pytest.raises(RuntimeError, match="use_cache=False"):
        model(**share(batch, group) | {"past_key_values": KACache(model.config), "use_cache": True})
    model = sequence_parallel(make_model(KAConfig(window=3, convolution=10)), group)
    with pytest.raises(ValueError, match="each rank's share must hold 9 tokens at least, got 8"):
        model(**share(batch, group))


def test_a_hybrid_with_convolutions_trains_as_in_one_process(tmp_path):
    alone(make_model, tmp_path)
    together(work, 3, tmp_path)
