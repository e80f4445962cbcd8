"""The one training loop: transformers' Trainer with early stopping, a table line an epoch, and resume after a kill."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_model, save_model
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback

from ka_attention.errors import UserError
from ka_attention.files import read_object, refuse_link, shown
from ka_attention.harness.run import hub, progress
from ka_attention.harness.run.settings import TrainingSettings
from ka_attention.harness.run.store import main_process
from ka_attention.harness.text.data import Sequences

WEIGHTS = "model.safetensors"
STATE = "trainer_state.json"
BEST = "best"
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@dataclass(frozen=True)
class Epoch:
    """A line of the table: ``train_ppl`` is exp of the epoch's mean training loss, ``seconds`` are of the steps alone.

    ``best``: whether the validation loss fell below that of all epochs before.
    """

    epoch: int
    train_ppl: float
    val_ppl: float
    seconds: float
    best: bool


@dataclass(frozen=True)
class Training:
    """How a training went; the best epoch's weights are those that were kept."""

    epochs: tuple[Epoch, ...]
    best_epoch: int
    best_val_ppl: float
    seconds_per_epoch: float
    parameters: int


def train(
    model: PreTrainedModel,
    train_set: Sequences,
    eval_set: Sequences,
    settings: TrainingSettings,
    folder: Path,
    *,
    seed: int,
    label: str,
    tokenizer: Any = None,
    console: Console = progress.console,
) -> Training:
    """Train ``model`` on ``train_set`` until ``eval_set``'s loss stops falling; it holds the best weights at return.

    The data sets yield ``{"input_ids", "labels"}``; the loss is the mean over labels that are not −100. ``seed`` orders
    the batches; the same seed gives the same order to every model. ``folder`` is what ``from_pretrained`` loads, with
    the best weights as ``model.safetensors`` and ``tokenizer``; until the end it holds a checkpoint an epoch: calling
    again with the same arguments after a kill continues from the last.

    Raises UserError where a loss is not finite, with the weights of the best epoch so far in ``folder``, and where the
    batch cannot be shared out among the processes.
    """
    use_cache = model.config.use_cache
    checkpoints = folder / "checkpoints"
    refuse_link(checkpoints, "--out")
    arguments = _arguments(settings, checkpoints, seed)
    steps = len(train_set) // settings.batch_size
    with progress.bar(label, settings.epochs * steps, console=console) as advance:
        trainer = _EpochTrainer(model, train_set, eval_set, settings, console, _Steps(advance), arguments)
        for callback in trainer.callback_handler.callbacks:
            if getattr(callback, "logging_dir", "") is None:  # TensorBoard's would go with the checkpoints
                callback.logging_dir = str(folder / "logs")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        console.print(f"\n[bold]{label}[/bold]: {parameters:,} parameters, seed {seed}")
        console.print("| Epoch | Train PPL |  Val PPL |    Time |   |")
        try:
            rows = trainer.run(_last_checkpoint(checkpoints))
        except _DivergedError as error:
            kept = "before an epoch was finished"
            if (checkpoints / BEST / WEIGHTS).exists():
                load_model(model, checkpoints / BEST / WEIGHTS, device=str(model.device))
                save(model, tokenizer, folder)
                kept = f"the weights of the best epoch are in {shown(folder)}"
            advice = f"--set learning_rate={settings.learning_rate / 10:g} with another --out"
            raise UserError(f"{label}: training diverged {error}, {kept}; try {advice}") from None
    trainer.accelerator.wait_for_everyone()
    load_model(model, checkpoints / BEST / WEIGHTS, device=str(model.device))
    trainer.accelerator.wait_for_everyone()
    model.config.use_cache = use_cache  # which the Trainer switches off
    save(model, tokenizer, folder)
    if main_process():
        shutil.rmtree(checkpoints)
    epochs = tuple(Epoch(**row) for row in rows)
    best = min(epochs, key=lambda row: row.val_ppl)
    seconds = sum(row.seconds for row in epochs) / len(epochs)
    return Training(epochs, best.epoch, best.val_ppl, seconds, parameters)


def save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write what ``from_pretrained`` loads, and the checksum of the weights, into ``folder``; on the main process."""
    if main_process():
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        hub.write_checksum(folder)


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Load the weights that ``train`` saved in ``folder``; UserError unless all are there."""
    try:
        saved = hub.load_model("--out", str(folder)).state_dict()
    except UserError as error:
        raise UserError(f"{error}; delete its file in parts/training, and the same command trains it again") from None
    model.load_state_dict(saved)


@torch.no_grad()
def mean_loss(model: Callable[..., Any], dataset: Dataset, batch_size: int, device: torch.device) -> float:
    """Mean cross-entropy in nats over all labels that are not −100, each weighing the same."""
    total, count = 0.0, 0
    for batch in DataLoader(dataset, batch_size=batch_size):
        labels = int((batch["labels"][:, 1:] != -100).sum())
        if labels:
            total += (
                model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False).loss.item()
                * labels
            )
            count += labels
    return total / count if count else math.nan


def _arguments(settings: TrainingSettings, checkpoints: Path, seed: int) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    if settings.report_to not in ("none", *get_available_reporting_integrations()):
        raise UserError(f"--set report_to: {settings.report_to} is not installed; pip install {settings.report_to}")
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        seed=seed,
        data_seed=seed,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        dataloader_drop_last=True,
        dataloader_pin_memory=cuda,
        use_cpu=not cuda,
        bf16=cuda,
        ddp_find_unused_parameters=False,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        report_to=settings.report_to,
        disable_tqdm=True,
        logging_nan_inf_filter=False,
    )
    if settings.batch_size % arguments.world_size:
        raise UserError(
            f"--set batch_size: {settings.batch_size} cannot be shared out among {arguments.world_size} processes"
        )
    arguments.per_device_train_batch_size = settings.batch_size // arguments.world_size
    return arguments


def _last_checkpoint(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint: the Trainer writes its state file last, and a kill may leave half of that."""
    whole = []
    for state in checkpoints.glob(f"checkpoint-*/{STATE}"):
        with suppress(UserError):
            read_object(state, "--out")
            whole.append(state.parent)
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class _DivergedError(ArithmeticError):
    """A loss that is not finite; the message says where."""


class _EpochTrainer(Trainer):
    """Trainer whose evaluation, once an epoch, makes the table line, keeps the best weights and decides to stop.

    The rows live in the Trainer's state: a checkpoint carries them, and a resumed run decides as an unbroken one.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        train_set: Sequences,
        eval_set: Sequences,
        settings: TrainingSettings,
        console: Console,
        steps: _Steps,
        arguments: TrainingArguments,
    ) -> None:
        super().__init__(network, arguments, train_dataset=train_set, eval_dataset=eval_set, callbacks=[steps])
        self.remove_callback(PrinterCallback)
        self.network, self.eval_set, self.steps_an_epoch = network, eval_set, len(train_set) // settings.batch_size
        self.settings, self.console, self.steps = settings, console, steps
        self.checkpoints = Path(str(arguments.output_dir))
        self.loss_before: Tensor | None = None

    def run(self, checkpoint: Path | None) -> list[dict[str, Any]]:
        """Train, continuing from ``checkpoint``, and return the table's rows."""
        rows = _rows(json.loads((checkpoint / STATE).read_text())["log_history"]) if checkpoint else []
        for row in rows:
            self._print(row)
            self.steps.advance(self.steps_an_epoch)
        if self._finished(rows):
            return rows
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        # Undo the autocast that accelerate wraps around forward: whoever evaluates the model decides for themselves.
        self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
        return _rows(self.state.log_history)

    def training_step(self, *inputs: Any, **options: Any) -> Tensor:
        """Asks for the loss of the step before, so that a GPU has this one to do meanwhile."""
        loss = super().training_step(*inputs, **options)
        if self.loss_before is not None and not torch.isfinite(self.loss_before):
            step = self.state.global_step
            epoch = (step - 1) // self.steps_an_epoch + 1
            raise _DivergedError(f"in epoch {epoch} (the loss of step {step} is {self.loss_before.item()})")
        self.loss_before = loss
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        seconds = time.perf_counter() - self.steps.epoch_began
        history = self.state.log_history
        train_loss = next(entry["loss"] for entry in reversed(history) if "loss" in entry)
        self.network.eval()
        with self.compute_loss_context_manager():
            val_loss = mean_loss(self.network, self.eval_set, self.settings.batch_size, self.args.device)
        self.network.train()
        earlier = _rows(history)
        epoch = len(earlier) + 1
        if not (train_loss < 100 and val_loss < 100):  # also false for NaN
            raise _DivergedError(f"in epoch {epoch} (training loss {train_loss:.3g}, validation loss {val_loss:.3g})")
        row = {
            "epoch": epoch,
            "train_ppl": math.exp(train_loss),
            "val_ppl": math.exp(val_loss),
            "seconds": seconds,
            "best": all(math.exp(val_loss) < other["val_ppl"] for other in earlier),
        }
        history.append(row)
        self.log({"eval_loss": val_loss})  # for report_to
        self._print(row)
        if row["best"]:
            self.save_model(str(self.checkpoints / BEST))
        self.control.should_training_stop |= self._finished([*earlier, row])
        return {"eval_loss": val_loss}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Weights under the model's own names, whole or not at all.

        transformers renames some (GPT-NeoX's head) in the files that it writes, and its Trainer does not rename them
        back when it resumes from a checkpoint: the model would go on with that part as it was initialised.
        """
        if self.args.should_save:
            path = Path(output_dir or self.checkpoints) / WEIGHTS
            path.parent.mkdir(parents=True, exist_ok=True)
            save_model(self.network, str(path.with_name(f".{WEIGHTS}")))
            path.with_name(f".{WEIGHTS}").replace(path)

    def _finished(self, rows: list[dict[str, Any]]) -> bool:
        since_best = next((since for since, row in enumerate(reversed(rows)) if row["best"]), 0)
        return len(rows) >= self.settings.epochs or since_best >= self.settings.patience

    def _print(self, row: dict[str, Any]) -> None:
        mark = "*" if row["best"] else " "
        self.console.print(
            f"| {row['epoch']:5} | {row['train_ppl']:9.1f} | {row['val_ppl']:8.1f} | {row['seconds']:6.1f}s | {mark} |"
        )


class _Steps(TrainerCallback):
    """Moves the progress bar and knows when the epoch began."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance
        self.epoch_began = 0.0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.epoch_began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.advance(1)


def _rows(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in history if "val_ppl" in entry]
