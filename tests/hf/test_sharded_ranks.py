"""Sequence parallelism with FSDP2, tensor parallelism, and their checkpoints, against one process in float64."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from processes import together
from text_shares import Run, make_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from ka_attention.hf import KAConfig, attach, register, sequence_parallel, share
from ka_attention.hf.tensor_parallel import layer_of_heads, with_gates

STEPS = 6


def sharded():
    """Two texts at a time, one for each pair of processes, which share its tokens; parameters over all."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    model = sequence_parallel(make_model(), mesh["sequence"])
    for layer in model.gpt_neox.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    text = mesh["data"].get_local_rank()
    part = lambda batch: share({name: x[text : text + 1] for name, x in batch.items()}, mesh["sequence"])  # noqa: E731
    return Run(model, part, 4)


def train(folder):
    expected = torch.load(f"{folder}/expected")
    run = sharded()
    assert (run.steps(0, 3) - expected[:3]).abs().max() < 1e-10
    run.save(f"{folder}/from-four")
    assert (run.steps(3, STEPS) - expected[3:]).abs().max() < 1e-10
    resumed = sharded().load(f"{folder}/from-one")
    assert (resumed.steps(3, STEPS) - expected[3:]).abs().max() < 1e-10
    whole = get_model_state_dict(resumed.model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        resumed.model.save_pretrained(f"{folder}/saved", state_dict=whole)


def test_shards_of_weights_and_of_texts_train_as_one_process_and_exchange_checkpoints(tmp_path):
    run = Run(make_model())
    first = run.steps(0, 3)
    run.save(tmp_path / "from-one")
    expected = torch.cat([first, run.steps(3, STEPS)])
    torch.save(expected, tmp_path / "expected")
    together(train, 4, tmp_path)
    resumed = Run(make_model()).load(tmp_path / "from-four")
    assert (resumed.steps(3, STEPS) - expected[3:]).abs().max() < 1e-10
    register()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    assert type(saved) is type(run.model)
    for name, found in saved.state_dict().items():
        assert (found - run.model.state_dict()[name]).abs().max() < 1e-8, name


GATES = ({"gate": "head", "output_gate": True}, {"gate": "token"}, {"gate_init": (0.1, 0.4, 0.6, 1.0)})


def make_llama(**ka):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=18, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, eos_token_id=None,
        tie_word_embeddings=ka.get("gate") == "token",
    )  # fmt: skip
    model = attach(LlamaForCausalLM(config), KAConfig(pattern="3:1", window=4, **ka)).double()
    for name, parameter in model.named_parameters():
        if "ka_gate" in name:
            torch.nn.init.uniform_(parameter, 0.1, 0.9)
    return model


def load_sharded(folder):
    config = DistributedConfig(tp_size=dist.get_world_size())
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.float64)


def shared_heads(folder):
    register()
    ids = torch.randint(1, 18, (2, 12), generator=torch.Generator().manual_seed(1))
    prompt = {"input_ids": ids[:, :5], "attention_mask": torch.ones(2, 5), "max_new_tokens": 7, "do_sample": False}
    for i, ka in enumerate(GATES):
        whole, model = make_llama(**ka), load_sharded(f"{folder}/{i}")
        found, expected = model(ids).logits, whole(ids).logits
        assert (found - expected).abs().max() < 1e-10
        grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        found.backward(grad)
        expected.backward(grad)
        for (name, p), want in zip(model.named_parameters(), whole.parameters(), strict=True):
            got = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            assert (got - want.grad).abs().max() < 1e-10, name
        assert model.generate(**prompt).equal(whole.generate(**prompt))
        model.save_pretrained(f"{folder}/back-{i}")


def test_heads_and_their_gates_are_shared_out(tmp_path):
    for i, ka in enumerate(GATES):
        make_llama(**ka).save_pretrained(tmp_path / str(i))
    together(shared_heads, 2, tmp_path)
    for i, ka in enumerate(GATES):
        back = AutoModelForCausalLM.from_pretrained(tmp_path / f"back-{i}").state_dict()
        whole = make_llama(**ka).state_dict()
        assert back.keys() == whole.keys()
        assert all(back[name].equal(whole[name]) for name in whole)


def test_heads_that_cannot_be_shared_out_are_refused():
    attention = make_llama().model.layers[0].self_attn
    with pytest.raises(ValueError, match=r"^tp_size: 4 query and 2 key heads must be multiples of 4"):
        layer_of_heads(attention.ka_layer, attention.config, 0, 4)
    with pytest.raises(ValueError, match=r"^tp_size: layers with adapters"):
        layer_of_heads(replace(attention.ka_layer, has_adapter=True), attention.config, 0, 2)
    plan = {"layers.*.self_attn.qkv_proj": "colwise_gather_output", "layers.*.mlp.up_proj": "colwise"}
    assert with_gates(plan, attention.config) == plan
    assert with_gates(None, attention.config) is None
