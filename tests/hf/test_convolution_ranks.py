"""Convolutions of a model whose texts are split over processes: it trains as in one process."""

import pytest
import torch
import torch.distributed as dist
from processes import together
from test_sequence_parallel import losses, packed
from text_shares import batches
from torch.nn.parallel import DistributedDataParallel
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from ka_attention.hf import KAConfig, attach, attention_modules, sequence_parallel, share

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
    group, size = dist.group.WORLD, dist.get_world_size()
    for kind in (dict, packed):
        expected = torch.load(f"{folder}/{kind.__name__}")
        model = sequence_parallel(make_model(), group)
        if kind is packed:  # messages are sent again where layers are computed again
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found = losses(DistributedDataParallel(model), lambda batch: share(batch, group), size, kind)
        dist.all_reduce(found)
        assert (found / size - expected).abs().max() < 1e-10
    model = sequence_parallel(make_model(KAConfig(window=3, convolution=10)), group)
    with pytest.raises(ValueError, match="each rank's share must hold 9 tokens at least, got 8"):
        model(**share(next(batches()), group))


def test_a_hybrid_with_convolutions_trains_as_in_one_process(tmp_path):
    for kind in (dict, packed):
        expected = losses(make_model(), kind=kind)
        assert (expected[0] - expected[-1]).abs() > 1e-3
        torch.save(expected, tmp_path / kind.__name__)
    together(work, 3, tmp_path)
