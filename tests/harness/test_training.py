import json
import math
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
from rich.console import Console
from transformers import Trainer, TrainerCallback
from transformers.integrations import integration_utils

from ka_attention.errors import UserError
from ka_attention.harness.models.arms import arm, build
from ka_attention.harness.run.records import from_json, to_json
from ka_attention.harness.run.settings import TrainingSettings
from ka_attention.harness.text.data import Sequences
from ka_attention.harness.training import trainer
from ka_attention.harness.training.trainer import Training, load_weights, mean_loss, train

SETTINGS = TrainingSettings(batch_size=4, learning_rate=3e-3, epochs=3, patience=3)


@pytest.fixture(scope="module")
def text():
    """A stream in which the next token follows from the last; validation is another part of it."""
    stream = (torch.arange(32 * 16) * 7 % 50).view(32, 16)
    return Sequences(stream[:24]), Sequences(stream[24:])


def model(name="softmax", seed=0):
    return build(arm(name), tiny.recipe(vocab_size=50), seed)


def run(text, folder, settings=SETTINGS, name="softmax", console=None):
    trained = model(name)
    result = train(trained, *text, settings, folder, seed=0, label=name, console=console or Console(quiet=True))
    return trained, result


def test_the_table_is_that_of_the_reports_and_the_numbers_are_the_models(text, tmp_path):
    console = Console(record=True, width=100)
    trained, result = run(text, tmp_path, console=console)
    rows = result.epochs
    assert [row.epoch for row in rows] == [1, 2, 3]
    assert rows[-1].val_ppl < rows[0].val_ppl < 60
    assert result.best_val_ppl == min(row.val_ppl for row in rows)
    assert result.parameters == sum(parameter.numel() for parameter in trained.parameters())
    # Validation PPL from the definition, in one forward pass.
    tokens = text[1].input_ids
    logits = trained(tokens).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten())
    assert loss.exp().item() == pytest.approx(result.best_val_ppl, rel=1e-5)
    printed = console.export_text()
    assert "| Epoch | Train PPL |  Val PPL |    Time |   |" in printed
    assert f"|     1 | {rows[0].train_ppl:9.1f} | {rows[0].val_ppl:8.1f} |" in printed


def test_train_ppl_is_the_mean_loss_over_the_epochs_batches(text, tmp_path):
    """With a learning rate of almost nothing every batch is scored by the initial weights."""
    _, result = run(text, tmp_path, replace(SETTINGS, learning_rate=1e-12, epochs=1))
    expected = mean_loss(model(), text[0], 4, torch.device("cpu"))
    assert math.log(result.epochs[0].train_ppl) == pytest.approx(expected, rel=1e-5)


def test_early_stopping_counts_epochs_without_improvement_and_the_best_weights_come_back(text, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.0, 1.0])
    weights = []

    def scripted(network, *_):
        weights.append(network.gpt_neox.embed_in.weight.detach().clone())
        return next(losses)

    monkeypatch.setattr(trainer, "mean_loss", scripted)
    trained, result = run(text, tmp_path, replace(SETTINGS, epochs=9, patience=2))
    assert [row.best for row in result.epochs] == [True, True, False, False]
    assert (result.best_epoch, result.best_val_ppl) == (2, math.exp(2.0))
    assert torch.equal(trained.gpt_neox.embed_in.weight, weights[1])
    assert not torch.equal(weights[1], weights[3])
    loaded = model(seed=1)
    load_weights(loaded, tmp_path)
    assert torch.equal(loaded.gpt_neox.embed_in.weight, weights[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.sha256",
    ]
    assert trained.config.use_cache, "the Trainer switches it off, and a saved model would generate slowly"


@pytest.mark.parametrize("name", ["ka", "ka-head-w4"])
def test_two_runs_are_equal_to_the_bit_and_gates_are_trained_and_saved(text, tmp_path, name):
    first, one = run(text, tmp_path / "1", name=name)
    second, two = run(text, tmp_path / "2", name=name)
    assert [row.val_ppl for row in one.epochs] == [row.val_ppl for row in two.epochs]
    assert [row.train_ppl for row in one.epochs] == [row.train_ppl for row in two.epochs]
    fresh = model(name).state_dict()
    for key, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[key])
        assert not torch.equal(weight, fresh[key]) or weight.numel() == 0, f"{key} was not trained"


class _Kill(BaseException):
    pass


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run that nothing cuts off."""
    return run(text, tmp_path_factory.mktemp("whole"), replace(SETTINGS, schedule="cosine"))[1]


@pytest.mark.parametrize("moment", ["epoch_2", "after_the_last_epoch", "half_a_checkpoint", "half_a_state"])
def test_a_run_that_is_cut_off_continues_to_the_same_numbers(text, whole, tmp_path, monkeypatch, moment):
    settings, folder = replace(SETTINGS, schedule="cosine"), tmp_path / "cut"
    with monkeypatch.context() as patch:
        if moment == "after_the_last_epoch":
            patch.setattr(trainer, "load_model", lambda *_, **__: (_ for _ in ()).throw(_Kill))
        else:
            calls = []

            def dies_in_the_second_epoch(*arguments):
                calls.append(1)
                if len(calls) == 2:
                    raise _Kill
                return mean_loss(*arguments)

            patch.setattr(trainer, "mean_loss", dies_in_the_second_epoch)
        with pytest.raises(_Kill):
            run(text, folder, settings)
    if moment in ("half_a_checkpoint", "half_a_state"):
        shutil.copytree(folder / "checkpoints" / "checkpoint-6", folder / "checkpoints" / "checkpoint-12")
        state = folder / "checkpoints" / "checkpoint-12" / "trainer_state.json"
        state.write_text(state.read_text()[:99]) if moment == "half_a_state" else state.unlink()
    scored = []
    monkeypatch.setattr(trainer, "mean_loss", lambda *arguments: scored.append(1) or mean_loss(*arguments))
    continued = run(text, folder, settings)[1]
    assert len(scored) == (0 if moment == "after_the_last_epoch" else 2), "finished epochs are not trained again"
    for one, two in zip(whole.epochs, continued.epochs, strict=True):
        assert replace(one, seconds=0.0) == replace(two, seconds=0.0)


def test_labels_of_minus_100_give_no_loss(text, tmp_path):
    tokens = text[1].input_ids
    labels = tokens.clone()
    labels[:, :10] = -100
    labels[3, :] = -100
    network = model()
    found = mean_loss(network, Sequences(tokens, labels), 3, torch.device("cpu"))
    logits = network(tokens).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    kept = losses[:, 9:][torch.arange(len(tokens)) != 3]
    assert found == pytest.approx(kept.mean().item(), rel=1e-5)


def test_a_diverging_run_says_so(text, tmp_path):
    with pytest.raises(UserError, match=r"diverged in epoch \d .*--set learning_rate=1e\+18 with another --out$"):
        run(text, tmp_path, replace(SETTINGS, learning_rate=1e19))


@pytest.mark.parametrize("broken", [2, 9])  # steps; an epoch has six
def test_a_loss_that_is_not_finite_stops_at_the_next_step_and_the_best_weights_stay(
    text, tmp_path, monkeypatch, broken
):
    steps = []
    step = Trainer.training_step

    def break_down(self, model, *inputs, **options):
        steps.append(1)
        if len(steps) == broken:
            with torch.no_grad():
                next(model.parameters()).fill_(torch.inf)
        return step(self, model, *inputs, **options)

    monkeypatch.setattr(Trainer, "training_step", break_down)
    epoch = (broken - 1) // 6 + 1
    kept = "before an epoch was finished" if epoch == 1 else rf"the weights of the best epoch are in {tmp_path}"
    where = rf"softmax: training diverged in epoch {epoch} \(the loss of step {broken} is nan\), {kept}; try --set"
    with pytest.raises(UserError, match=where):
        run(text, tmp_path)
    assert len(steps) == broken + 1
    if epoch == 2:
        best = run(text, tmp_path / "one", replace(SETTINGS, epochs=1))[0]
        loaded = model(seed=1)
        load_weights(loaded, tmp_path)
        for key, weight in loaded.state_dict().items():
            assert torch.equal(weight, best.state_dict()[key])


def test_a_checkpoints_folder_that_is_a_link_is_refused_before_training(text, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"--out: .*run/checkpoints is a link"):
        run(text, tmp_path / "run")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_weights_that_are_not_those_of_their_checksum_are_refused(text, tmp_path):
    run(text, tmp_path, replace(SETTINGS, epochs=1))
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"its weights are not those of model\.safetensors\.sha256"):
        load_weights(model(), tmp_path)
    (tmp_path / "model.safetensors.sha256").unlink()
    load_weights(model(), tmp_path)


def test_losses_are_given_to_what_report_to_names(text, tmp_path, monkeypatch):
    found = []

    class Tracker(TrainerCallback):
        logging_dir = None

        def on_log(self, args, state, control, logs=None, **_):
            found.append((self.logging_dir, state.global_step, sorted(logs)))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Tracker)
    settings = replace(SETTINGS, epochs=1, report_to="trackio")
    monkeypatch.setattr(trainer, "get_available_reporting_integrations", lambda: [])
    with pytest.raises(UserError, match="--set report_to: trackio is not installed; pip install trackio"):
        run(text, tmp_path, settings)
    monkeypatch.setattr(trainer, "get_available_reporting_integrations", lambda: ["trackio"])
    run(text, tmp_path, settings)
    assert {folder for folder, *_ in found} == {str(tmp_path / "logs")}
    assert [(step, "loss" in keys, "eval_loss" in keys) for _, step, keys in found[:2]] == [
        (6, True, False),
        (6, False, True),
    ]


def test_the_result_is_json(text, tmp_path):
    _, result = run(text, tmp_path, replace(SETTINGS, epochs=1))
    assert from_json(Training, json.loads(json.dumps(to_json(result)))) == result
    assert result.seconds_per_epoch == result.epochs[0].seconds > 0
