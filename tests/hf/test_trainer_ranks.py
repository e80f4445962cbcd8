"""A Trainer or an Accelerator whose processes read shares of texts does what one process does with whole texts."""

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from processes import together
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from ka_attention.hf import KAConfig, SequenceParallelMixin, attach, sequence_parallel, share, share_batches

LENGTH = 16


class LongTextTrainer(SequenceParallelMixin, Trainer):
    pass


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    ka = KAConfig(pattern="3:1", window=4, gate="head", gate_init=0.5)
    return attach(LlamaForCausalLM(config), ka).double()


def texts(number):
    """Their first tokens are not asked for, of some more than of others."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(number):
        ids = torch.randint(3, (LENGTH,), generator=generator)
        found.append({"input_ids": ids, "labels": ids.where(torch.arange(LENGTH) > i, -100)})
    return found


def arguments(folder, batch, **more):
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        num_train_epochs=1,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_steps=1,
        report_to=[],
        disable_tqdm=True,
        **more,
    )


def history(trainer, **more):
    trainer.train(**more)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return torch.tensor([*losses, trainer.evaluate()["eval_loss"]], dtype=torch.float64)


def make_trainer(folder, batch, number, model=None):
    kind = Trainer if model is None else LongTextTrainer
    args = arguments(folder, batch)
    return kind(model or make_model(), args, train_dataset=texts(number), eval_dataset=texts(number))


def split_model(size):
    mesh = init_device_mesh("cpu", (dist.get_world_size() // size, size), mesh_dim_names=("data", "sequence"))
    return sequence_parallel(make_model(), mesh["sequence"]), mesh["sequence"]


def train(folder, number):
    """With the Trainer, in groups of two processes; the second time from a checkpoint of one process."""
    for again in ({}, {"resume_from_checkpoint": f"{folder}/whole/checkpoint-1"}):
        trainer = make_trainer(f"{folder}/split", 8 // dist.get_world_size(), number, split_model(2)[0])
        found = history(trainer, **again)
        assert (found - torch.load(f"{folder}/expected")).abs().max() < 1e-6  # the Trainer keeps its losses in float32
        assert trainer.get_total_train_batch_size(trainer.args) == 8


# Groups read texts of their own, or there is one group and its last batches have two texts.
@pytest.mark.parametrize(("size", "number"), [(2, 14), (4, 16)])
def test_the_log_of_a_trainer_is_that_of_one_process(size, number, tmp_path):
    expected = history(make_trainer(tmp_path / "whole", 4, number))
    assert expected[0] - expected[-1] > 0.1
    torch.save(expected, tmp_path / "expected")
    together(train, size, tmp_path, number)


def accelerated(folder, number):
    accelerator = Accelerator(cpu=True)
    model, group = split_model(2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    loader = share_batches(accelerator.prepare(DataLoader(texts(number), batch_size=4)), group)
    assert share_batches(loader, group) is loader
    losses = []
    for batch in loader:
        assert batch["input_ids"].shape == (4, LENGTH // 2)
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean"))
    expected = torch.load(f"{folder}/expected")
    assert (torch.stack(losses) - expected).abs().max() < 1e-6


def test_a_loop_with_an_accelerator_is_that_of_one_process(tmp_path):
    model, losses = make_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for batch in DataLoader(texts(12), batch_size=4):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    torch.save(torch.stack(losses), tmp_path / "expected")
    together(accelerated, 2, tmp_path, 12)


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_what_looks_at_whole_texts_is_refused(group, tmp_path, monkeypatch):
    args = arguments(tmp_path, 1)
    with pytest.raises(ValueError, match=r"^model: call .*sequence_parallel"):
        LongTextTrainer(make_model(), args)
    model = sequence_parallel(make_model(), group)
    with pytest.raises(ValueError, match=r"^compute_metrics: "):
        LongTextTrainer(model, args, compute_metrics=len)
    with pytest.raises(ValueError, match=r"^label_smoother: "):
        LongTextTrainer(model, arguments(tmp_path, 1, label_smoothing_factor=0.1))
    with pytest.raises(ValueError, match=r"^average_tokens_across_devices"):
        LongTextTrainer(model, arguments(tmp_path, 1, average_tokens_across_devices=False))
    loader = DataLoader(texts(2), batch_size=1)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    with pytest.raises(ValueError, match="consecutive ranks, 2 each"):
        share_batches(loader, group)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1])
    with pytest.raises(ValueError, match=r"^loader: .*dispatch_batches=False"):
        share_batches(loader, group)


def test_padding_stands_at_the_ends_of_texts(group):
    ids = torch.arange(8).view(2, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask > 0, -100)}
    cut = share(batch, group)
    assert cut["attention_mask"].shape == (1, 1, 1, 1)
    assert cut["num_items_in_batch"] == 4
    with pytest.raises(ValueError, match="labels of padding must be -100"):
        share(batch | {"labels": ids}, group)
    with pytest.raises(ValueError, match="hides more than the ends"):
        share(batch | {"attention_mask": mask.flip(1)}, group)
