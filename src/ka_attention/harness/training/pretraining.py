"""Training from scratch on text that is plentiful: a plain loop over a token file, evaluated at fixed token counts."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ka_attention.errors import UserError
from ka_attention.harness.models.passes import Passes
from ka_attention.harness.run.progress import bar
from ka_attention.harness.run.records import from_json, to_json
from ka_attention.harness.run.timing import now
from ka_attention.harness.text.tokens import Order, TokenFile
from ka_attention.hf.gates import KAGate

CHECKPOINT_SECONDS = 300.0
PEAKS = {"H100": 989e12, "H200": 989e12}  # operations a second, dense bfloat16, by the vendor's datasheet
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True, kw_only=True)
class PretrainingSettings:
    """AdamW (betas 0.9 and 0.95, gradients clipped to norm 1, decay of matrices alone), bfloat16 autocast on CUDA.

    sequence_length, batch_size: tokens in a sequence, sequences a step.
    train_tokens:         how many tokens are read; every epoch in a new order.
    validation_sequences: a multiple of ``batch_size``.
    evaluations:          so many times, at equal distances, the last one at the end.
    learning_rate:        the peak, after ``warmup_steps`` of linear increase; then a cosine to 0.
    """

    sequence_length: int
    batch_size: int
    train_tokens: int
    validation_sequences: int
    evaluations: int = 4
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < self.evaluations:
            raise UserError(
                f"--set train_tokens: expected at least evaluations × batch_size × sequence_length = "
                f"{self.evaluations * self.batch_size * self.sequence_length:,}, got {self.train_tokens:,}"
            )
        if self.validation_sequences % self.batch_size:
            raise UserError(
                f"--set validation_sequences: expected a multiple of batch_size = {self.batch_size}, "
                f"got {self.validation_sequences}"
            )

    @property
    def steps(self) -> int:
        """Steps of a training."""
        return self.train_tokens // (self.batch_size * self.sequence_length)

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2

    def evaluated_at(self) -> list[int]:
        """The numbers of steps after which the validation text is read."""
        return [self.steps * (i + 1) // self.evaluations for i in range(self.evaluations)]


@dataclass(frozen=True)
class Octave:
    """Mean cross-entropy in nats where the positions ``first`` to ``last`` predict the next token."""

    first: int
    last: int
    loss: float


@dataclass(frozen=True)
class Row:
    """One evaluation.

    tokens:      read so far.
    train_loss:  the mean since the evaluation before.
    seconds:     of the training steps so far.
    loss:        of the validation sequences: mean cross-entropy in nats; ``by_position`` the same by octave.
    """

    tokens: int
    train_loss: float
    seconds: float
    loss: float
    by_position: tuple[Octave, ...]


@dataclass(frozen=True)
class Pretraining:
    """A training: a row an evaluation, and what it took.

    epochs:          how often each sequence was read, on average.
    seconds:         of the training steps alone; ``compile_seconds`` were spent before the clock ran.
    """

    learning_rate: float
    tokens: int
    steps: int
    epochs: float
    seconds: float
    compile_seconds: float
    rows: tuple[Row, ...]

    @property
    def loss(self) -> float:
        """Of the validation sequences at the end."""
        return self.rows[-1].loss

    @property
    def tokens_per_s(self) -> float:
        """Speed of the training steps."""
        return self.tokens / self.seconds


def pretrain(
    model: Any,
    text: tuple[TokenFile, TokenFile],
    settings: PretrainingSettings,
    passes: Passes,
    folder: Path,
    *,
    seed: int,
    label: str,
    gate_rate: float = 1.0,
    progress: Progress = bar,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> Pretraining:
    """Train ``model``, in place, on ``text`` (training, validation); the order of batches depends on ``seed`` alone.

    gate_rate: the learning rate of KA's gates, in those of the weights.
    Every ``checkpoint_seconds`` the state is saved in ``folder``, from which a call with the same arguments goes on; it
    is deleted at the end.
    Raises UserError where the loss is not finite.
    """
    train_text, validation = text
    device, length = model.device, settings.sequence_length
    order = Order(train_text.sequences(length), settings.batch_size, seed)
    optimizer = adamw(model, settings, gate_rate=gate_rate)
    total = torch.zeros((), device=device)

    def work(ids: Tensor) -> Tensor:
        return total.add_(step(model, optimizer, passes, ids[:, :-1], ids[:, 1:]))

    def batch(number: int) -> Tensor:
        return placed(device, train_text, order[number], length)

    began = now(device)
    with unchanged(model, optimizer):
        learn, score = passes.ready(work, batch(0)), passes.ready(partial(scores, model, passes), batch(0))
    total.zero_()
    compile_seconds = now(device) - began
    saved = folder / "checkpoint.pt"
    done, seconds, rows = 0, 0.0, []
    if saved.exists():
        state = torch.load(saved, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        with torch.no_grad():
            for number, stored in zip(_numbers(optimizer), state["optimizer"], strict=True):
                number.copy_(stored)
            total.copy_(state["total"])
        done, seconds, rows = state["step"], state["seconds"], [from_json(Row, row) for row in state["rows"]]
    ends = settings.evaluated_at()
    checkpointed = time.perf_counter()
    with progress(label, settings.steps) as advance:
        advance(done)
        began = now(device)
        while done < settings.steps:
            set_rate(optimizer, settings.rate(done))
            learn(batch(done))
            done += 1
            advance(1)
            if done in ends:
                seconds += now(device) - began
                octaves = evaluate(score, validation, settings, device)
                loss, mean = mean_loss(octaves), total.item() / (done - [0, *ends][ends.index(done)])
                if not (mean < 100 and loss < 100):  # also false for NaN
                    raise UserError(
                        f"{label}: training diverged by step {done} (loss {loss:.3g}); "
                        f"try a smaller learning rate than {settings.learning_rate:g}"
                    )
                rows.append(Row(done * settings.batch_size * length, mean, seconds, loss, octaves))
                total.zero_()
                began = now(device)
            if time.perf_counter() - checkpointed > checkpoint_seconds and done < settings.steps:
                seconds += now(device) - began
                state = {"model": model.state_dict(), "optimizer": _numbers(optimizer), "total": total}
                _save(state | {"step": done, "seconds": seconds, "rows": to_json(rows)}, saved)
                checkpointed, began = time.perf_counter(), now(device)
    saved.unlink(missing_ok=True)
    return Pretraining(
        learning_rate=settings.learning_rate,
        tokens=settings.steps * settings.batch_size * length,
        steps=settings.steps,
        epochs=order.epochs(settings.steps),
        seconds=seconds,
        compile_seconds=compile_seconds,
        rows=tuple(rows),
    )


def step(model: Any, optimizer: torch.optim.Optimizer, passes: Passes, ids: Tensor, targets: Tensor) -> Tensor:
    """One step of training on tokens and targets ``[B, T]``; the loss before it."""
    with numerics(model.device):
        loss = passes.loss(model, ids, targets)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def scores(model: Any, passes: Passes, ids: Tensor) -> Tensor:
    """Cross-entropy by position, summed over sequences ``[B, T + 1]``: float64 ``[T]``."""
    with numerics(model.device):
        return passes.token_losses(model, ids[:, :-1], ids[:, 1:]).double().sum(0)


def evaluate(
    score: Callable[[Tensor], Tensor], text: TokenFile, settings: PretrainingSettings, device: torch.device
) -> tuple[Octave, ...]:
    """Loss of the validation sequences where the positions 0 to 15, 16 to 31, 32 to 63 and so on predict.

    score: what `scores` does to a batch.
    """
    length, count, size = settings.sequence_length, settings.validation_sequences, settings.batch_size
    by_position = torch.zeros(length, dtype=torch.float64, device=device)
    for start in range(0, count, size):
        by_position += score(placed(device, text, np.arange(start, start + size), length))
    by_position /= count
    octaves = []
    first, last = 0, 15
    while first < length:
        last = min(last, length - 1)
        octaves.append(Octave(first, last, by_position[first : last + 1].mean().item()))
        first, last = last + 1, 2 * last + 1
    return tuple(octaves)


def mean_loss(octaves: Sequence[Octave]) -> float:
    """Over all positions."""
    sizes = [octave.last - octave.first + 1 for octave in octaves]
    return sum(size * octave.loss for size, octave in zip(sizes, octaves, strict=True)) / sum(sizes)


def numerics(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 autocast on CUDA, nothing elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


@contextmanager
def watched_gates(model: nn.Module) -> Iterator[dict[int, list[float]]]:
    """Within it every pass notes the gates of each KA layer: by layer, one mean per head."""
    found: dict[int, list[float]] = {}
    hooks = []
    for module in model.modules():
        if hasattr(module, "ka_gate"):

            def note(_: Any, __: Any, gate: Tensor, layer: int = module.layer_idx) -> None:  # type: ignore[assignment]
                gate = gate.detach().float()
                found[layer] = (gate.mean((0, 2)) if gate.ndim == 3 else gate).tolist()

            hooks.append(module.ka_gate.register_forward_hook(note))  # type: ignore[union-attr]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def operations(model: Any, attended: list[float]) -> float:
    """Floating-point operations of a training step, a token: 6 a weight that multiplies, 12 a channel and pair seen.

    attended: for each layer how many tokens a token attends to on average, 0 where it does not attend.
    """
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return 6 * weights + 12 * model.config.hidden_size * sum(attended)


def utilisation(operations_a_second: float) -> float | None:
    """Of the peak of this machine's accelerator, where it is a known one."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((peak for known, peak in PEAKS.items() if known in name), None)
    return None if peak is None else operations_a_second / peak


def placed(device: torch.device, text: TokenFile, numbers: np.ndarray, length: int) -> Tensor:
    """Sequences by number, each with the token after it, on the device: ``[len(numbers), length + 1]``."""
    rows = text.rows(numbers, length)
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows


def adamw(
    model: Any, settings: PretrainingSettings, *, gate_rate: float = 1.0, fused: bool = True
) -> torch.optim.AdamW:
    """The optimizer: weight decay on matrices of linear layers and embeddings, not on norms and gates.

    gate_rate: the learning rate of KA's gates, in those of the weights: a gate is one number, and a step of AdamW moves
               it by about the rate, however far it has to go.
    fused:     on CUDA in one kernel, with a learning rate on the device, so that a CUDA graph can hold a step.
    """
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)}
    gates = {id(p) for m in model.modules() if isinstance(m, KAGate) for p in m.parameters()}
    kinds: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in model.parameters():
        kind = settings.weight_decay if id(p) in decayed else 0.0, gate_rate if id(p) in gates else 1.0
        kinds.setdefault(kind, []).append(p)
    fused = fused and model.device.type == "cuda"
    groups: list[dict[str, Any]] = []
    for (decay, factor), parameters in kinds.items():
        rate = factor * settings.learning_rate
        lr = torch.tensor(rate, device=model.device) if fused else rate
        groups.append({"params": parameters, "weight_decay": decay, "lr": lr, "factor": factor})
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused, capturable=fused)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next steps, also of those that a graph holds; of each group times its ``factor``."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * group["factor"])
        else:
            group["lr"] = rate * group["factor"]


def _numbers(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All that the optimizer keeps, in an order that depends on the model alone."""
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"] if p in optimizer.state]
    return [state[name] for state in states for name in sorted(state)]


@contextmanager
def unchanged(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within it steps are only tried: at the end the model is as it was, and the optimizer knows nothing."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    model.load_state_dict(before)
    with torch.no_grad():
        for number in _numbers(optimizer):
            number.zero_()


def _save(state: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    torch.save(state, temporary)
    os.replace(temporary, path)
