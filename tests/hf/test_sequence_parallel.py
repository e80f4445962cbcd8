"""A model whose texts are split over processes trains as in one process, and refuses what it cannot do."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import together
from text_shares import LENGTH, batches, loss_of, make_model, shifted
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MistralConfig, MistralForCausalLM

from ka_attention.hf import KACache, KAConfig, attach, detach, reconfigure, sequence_parallel, share

PACKED = torch.tensor([3, 5, 12, 4])  # the second ends with the first of three shares, the third crosses the second


def packed(batch):
    """The first text as four sequences, whose positions begin again."""
    positions = torch.cat([torch.arange(n) for n in PACKED])[None]
    return {name: x[:1] for name, x in batch.items()} | {"position_ids": positions, "use_cache": False}


def losses(model, part=shifted, size=1, kind=dict):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    found = []
    for batch in map(kind, batches()):
        items = shifted(batch)["num_items_in_batch"].item() / size
        loss = loss_of(model, part(batch), items)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


def alone(make, folder):
    """Losses of a training in one process, for `check_alike`."""
    for kind in (dict, packed):
        expected = losses(make(), kind=kind)
        assert (expected[0] - expected[-1]).abs() > 1e-3
        torch.save(expected, folder / kind.__name__)


def check_alike(make, folder, recomputed=()):
    """A training over all processes has the losses of one; layers are computed again with some kinds of batches."""
    group, size = dist.group.WORLD, dist.get_world_size()
    for kind in (dict, packed):
        expected = torch.load(f"{folder}/{kind.__name__}")
        model = sequence_parallel(make(), group)
        if kind in recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found = losses(DistributedDataParallel(model), lambda batch: share(batch, group), size, kind)
        dist.all_reduce(found)
        assert (found / size - expected).abs().max() < 1e-10


def own_windows(group):
    """Mistral's window is in a mask of [n, n] in one process; shares of texts have none."""
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 6, "num_key_value_heads": 3}
    config = MistralConfig(vocab_size=17, num_hidden_layers=4, head_dim=8, sliding_window=5, **sizes)
    torch.manual_seed(0)
    model = attach(MistralForCausalLM(config), KAConfig(pattern="3:1", window=3))
    batch = next(batches())
    whole, own = model(**batch, use_cache=False).logits, dist.get_rank(group) * 8
    found = sequence_parallel(model, group)(**share(batch, group)).logits
    assert torch.allclose(found, whole[:, own : own + 8], atol=1e-5)


def work(folder):
    group, size = dist.group.WORLD, dist.get_world_size()
    check_alike(make_model, folder)
    model, batch = sequence_parallel(make_model(), group), next(batches())
    cache = {"past_key_values": KACache(model.config), "use_cache": True}
    hidden = torch.zeros(2, LENGTH // size, dtype=torch.long)
    nothing = {"attention_mask": None}  # as where every process calls the model with texts of its own
    for wrong, words in (
        (cache, "use_cache=False"),
        ({"attention_mask": hidden}, "packed"),
        (nothing, "that of .*share"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=words):
            model(**share(batch, group) | wrong)
    with pytest.raises(ValueError, match="ends of texts"):
        share(batch | {"attention_mask": batch["labels"] > 0}, group)
    with pytest.raises(ValueError, match="25 tokens cannot be shared out"):
        share({"input_ids": torch.zeros(1, 25, dtype=torch.long)}, group)
    for wrong in ({"input_ids": batch["input_ids"][0]}, {"position_ids": torch.arange(LENGTH)}):
        with pytest.raises(ValueError, match=r"expected input_ids, and labels .* \[B, T\]"):
            share(batch | wrong, group)
    with pytest.raises(ValueError, match=r"expected input_ids, .* got \{\}"):
        share({"inputs_embeds": torch.zeros(1, LENGTH, 8)}, group)
    with pytest.raises(ValueError, match="stand in one row, got 2"):
        share(batch | {"position_ids": packed(batch)["position_ids"].expand(2, -1)}, group)
    own_windows(group)
    whole = sequence_parallel(copy.deepcopy(make_model()), None)
    assert whole(**batch).logits.shape == (2, LENGTH, 17)


def test_a_hybrid_trains_as_in_one_process(tmp_path):
    alone(make_model, tmp_path)
    together(work, 3, tmp_path)


@pytest.fixture
def two_processes(tmp_path):
    """A group that says it has two processes; nothing is sent."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_refusals_change_nothing(two_processes, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 4)
    model = make_model()
    with pytest.raises(ValueError, match="6 query and 6 key heads, which must be multiples of the 4"):
        sequence_parallel(model, two_processes)
    assert all(layer.attention.ka_layer.group is None for layer in model.gpt_neox.layers)
    with pytest.raises(ValueError, match="dropout"):
        sequence_parallel(make_model(KAConfig(gate_init=0.0), attention_dropout=0.1), two_processes)
    with pytest.raises(ValueError, match="output_router_logits"):
        sequence_parallel(make_model(output_router_logits=True), two_processes)
    config = GPTNeoXConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=8)
    with pytest.raises(ValueError, match="no KA model"):
        sequence_parallel(GPTNeoXForCausalLM(config), two_processes)
    sequence_parallel(make_model(KAConfig(window=3)), two_processes)  # windows ask nothing of the heads
    for wrong in ("world", SimpleNamespace(get_group=None, ndim=2)):
        with pytest.raises(ValueError, match="group: expected a ProcessGroup or one dimension of a DeviceMesh"):
            sequence_parallel(make_model(KAConfig(window=3)), wrong)


def test_a_model_in_shares_stays_so(two_processes):
    """Where its settings change, and in a copy (an average of weights is made of one); else shares would be texts."""
    model = sequence_parallel(make_model(KAConfig(window=3)), two_processes)
    for each in (AveragedModel(model).module, model):
        reconfigure(each, KAConfig(window=2))
        layers = [layer.attention.ka_layer for layer in each.gpt_neox.layers]
        assert [(layer.group, layer.window) for layer in layers] == [(two_processes, 2)] * len(layers)
    assert attach(detach(model)).gpt_neox.layers[0].attention.ka_layer.group is None
