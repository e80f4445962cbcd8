"""Conversion: it starts as the softmax model, ends as a KA model, resumes exactly, and its losses do what they say."""

import copy

import pytest
import torch
import zoo
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM

from ka_attention.conversion.raising import Conversion, convert, layer_outputs
from ka_attention.errors import UserError
from ka_attention.hf import KAConfig, attention_modules, use


class Tokens(Dataset):
    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


@pytest.fixture
def data():
    return Tokens(zoo.tokens(32, 12))


@pytest.fixture
def model():
    return zoo.make("gpt_neox").float()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def follow(model, teacher, ids):
    """The stage-one loss written out, without autograd."""
    with layer_outputs(teacher) as wanted:
        target = logits(teacher, ids).log_softmax(-1)
    with layer_outputs(model) as found:
        student = logits(model, ids).log_softmax(-1)
    layers = [(s - t).square().sum() / t.square().sum() for s, t in zip(found, wanted, strict=True)]
    return sum(layers) / len(layers) + (target.exp() * (target - student)).sum(-1).mean()


def test_the_schedule_runs_from_0_to_1():
    plan = Conversion(steps=10, ramp=0.4)
    assert [plan.gate(step) for step in (0, 1, 2, 4, 10)] == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert Conversion(steps=10, ramp=0.0).gate(0) == 0.0
    assert Conversion(steps=10, ramp=0.0).gate(1) == 1.0
    assert Conversion(steps=10, target="softmax").gate(10) == 0.0
    assert [Conversion(steps=10, stage_one=0.8).follows(step) for step in (0, 7, 8)] == [True, True, False]


@pytest.mark.parametrize("target", ["softmax", "learned"])
def test_it_starts_as_the_softmax_model(model, target):
    ids = zoo.tokens()
    softmax = logits(model, ids)
    with use(model, Conversion(steps=1, target=target).result()):
        # The gate 0 that is fixed runs softmax attention itself; a free one is the operator, equal to rounding.
        torch.testing.assert_close(logits(model, ids), softmax, rtol=0, atol=0 if target == "softmax" else 1e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_it_ends_as_a_ka_model_that_follows_its_teacher(model, data, tmp_path, window):
    teacher, converted = copy.deepcopy(model), copy.deepcopy(model)
    plan = Conversion(steps=20, learning_rate=3e-3, stage_one=1.0, window=window)
    rows = convert(
        converted, data, plan, tmp_path, evaluations=2, perplexity=lambda m: m.config.ka_config["window"] or 0
    )
    assert [(row["step"], row["gate"], row["ppl"]) for row in rows] == [(10, 1.0, window or 0), (20, 1.0, window or 0)]
    assert KAConfig.of(converted.config) == KAConfig(window=window)
    assert not any(hasattr(module, "ka_gate") for module in attention_modules(converted))
    with use(model, window=window):
        before = follow(model, teacher, data.ids)
    assert follow(converted, teacher, data.ids) < 0.8 * before


def test_following_is_the_loss_of_stage_one(model, data, tmp_path, monkeypatch):
    """One step with plain gradient descent moves the weights along the gradient of the loss written out."""
    from ka_attention.conversion import raising as module

    losses = []
    original = module._Trainer.compute_loss

    def spy(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        losses.append((loss.item(), follow(self.network, self.teacher, args[1]["input_ids"]).item()))
        return loss

    monkeypatch.setattr(module._Trainer, "compute_loss", spy)
    convert(model, data, Conversion(steps=3, stage_one=1.0, ramp=1.0), tmp_path)
    for found, expected in losses:
        assert found == pytest.approx(expected, rel=1e-4)


def test_free_gates_move_and_stay(model, data, tmp_path):
    convert(model, data, Conversion(steps=6, target="learned", stage_one=0.0), tmp_path)
    gates = torch.stack([module.ka_gate(None) for module in attention_modules(model)])
    assert KAConfig.of(model.config).gate == "head"
    assert (gates != 0).any()
    assert ((gates >= 0) & (gates <= 1)).all()


def test_a_stopped_conversion_goes_on_exactly(model, data, tmp_path):
    plan = Conversion(steps=8, learning_rate=1e-3, stage_one=0.5, ramp=0.75)

    def run(folder, stop=None):
        converted, steps = copy.deepcopy(model), []

        def on_step():
            steps.append(1)
            if len(steps) == stop:
                raise KeyboardInterrupt

        rows = convert(converted, data, plan, folder, evaluations=4, perplexity=lambda m: 0.0, on_step=on_step)
        return converted, rows, len(steps)

    whole, rows, _ = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop=5)
    resumed, resumed_rows, steps = run(tmp_path / "parts")
    assert steps == 4  # from the checkpoint of step 4
    assert resumed_rows == rows
    assert [row["gate"] for row in rows] == pytest.approx([plan.gate(step) for step in (2, 4, 6, 8)])
    for name, tensor in whole.state_dict().items():
        assert resumed.state_dict()[name].equal(tensor), name


def test_attention_learns_faster_and_every_parameter_learns_once(model, data, tmp_path, monkeypatch):
    from ka_attention.conversion import raising as module

    made = []
    original = module._Trainer.create_optimizer
    monkeypatch.setattr(module._Trainer, "create_optimizer", lambda *a: made.append(original(*a)) or made[-1])
    convert(model, data, Conversion(steps=1, learning_rate=1e-3, target="learned"), tmp_path, evaluations=0)
    others, attention, gates = made[0].param_groups
    assert [group["initial_lr"] for group in made[0].param_groups] == pytest.approx([1e-3, 3e-3, module.GATE_RATE])
    assert len(gates["params"]) == 3
    assert {id(p) for p in attention["params"]} == {
        id(p) for m in attention_modules(model) for name, p in m.named_parameters() if "ka_gate" not in name
    }
    assert len(others["params"] + attention["params"] + gates["params"]) == len(list(model.parameters()))


def test_nothing_is_kept_where_nothing_is_asked_for(model, data, tmp_path):
    assert convert(model, data, Conversion(steps=2), tmp_path, evaluations=0) == []
    assert list(tmp_path.iterdir()) == []
    assert KAConfig.of(model.config) == KAConfig()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
        ({"target": "half"}, "target: expected 'ka', 'learned' or 'softmax', got 'half'"),
        ({"ramp": 1.5}, "ramp: expected a share between 0 and 1, got 1.5"),
    ],
)
def test_wrong_settings_name_what_is_allowed(wrong, message):
    with pytest.raises(ValueError, match=message):
        Conversion(**{"steps": 1, **wrong})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_train_in_float32(model, data, tmp_path, dtype):
    """At a rate at which bfloat16 weights would stay where they are, nearly all move, and none becomes NaN."""
    before = {name: p.detach().float().clone() for name, p in model.to(dtype).named_parameters()}
    convert(model, data, Conversion(steps=2, learning_rate=1e-5, stage_one=0.0), tmp_path, evaluations=0)
    moved = [(p != before[name]).double().mean() for name, p in model.named_parameters()]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert torch.stack(moved).mean() > 0.9


def test_the_control_follows_its_teacher_in_no_way_but_its_loss(model, data, tmp_path):
    """target="softmax" is the control: its gates stay 0 and its teacher is the model from before, not itself."""
    from ka_attention.conversion.raising import _Trainer

    seen = []

    def on_step():
        pass

    teacher = copy.deepcopy(model)
    original = _Trainer.compute_loss

    def spy(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        ids = args[1]["input_ids"]
        seen.append((loss.item(), follow(model, teacher, ids).item(), model(input_ids=ids, labels=ids).loss.item()))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Trainer, "compute_loss", spy)
        plan = Conversion(steps=6, target="softmax", stage_one=0.5, learning_rate=1e-2)
        convert(model, data, plan, tmp_path, evaluations=0, on_step=on_step)
    for step, (found, following, language) in enumerate(seen):
        assert found == pytest.approx(following if step < 3 else language, rel=1e-4, abs=1e-6)
    assert seen[2][0] > 1e-6  # it has left its teacher, so following itself would be another loss
    assert KAConfig.of(model.config).gate_init == 0


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_it_and_the_last_good_weights_stay(model, data, tmp_path, monkeypatch, where):
    from ka_attention.conversion import raising as module

    original, weights = module._Trainer._loss, []

    def spoilt(self, *args):
        loss = original(self, *args)
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        if len(weights) < 3:
            return loss
        # sqrt at 0: the loss is finite and its gradient is not
        return loss * torch.nan if where == "loss" else loss + (loss - loss.detach()).sqrt()

    monkeypatch.setattr(module._Trainer, "_loss", spoilt)
    with pytest.raises(
        UserError, match=rf"^convert: the {where} is not finite.* in step 3, .*last-good; try a learning"
    ):
        convert(model, data, Conversion(steps=6, stage_one=0.0), tmp_path)
    assert len(weights) == 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "last-good")
    for found in (model, again):
        assert all(p.equal(weights[-1][name]) for name, p in found.named_parameters())
