"""Conversion: a softmax model becomes a KA model by raising its gates from 0, where it is the same model, in training.

Stage one follows the frozen softmax model T: mean over layers of ‖S − T‖² / ‖T‖², for what attention adds to the
residual stream, plus the Kullback-Leibler divergence (nats per token) of the next-token distributions. Stage two is the
language-model loss on the text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from ka_attention.conversion.finite import NotFiniteError, require_finite
from ka_attention.errors import UserError
from ka_attention.hf.attach import attach, detach
from ka_attention.hf.config import KAConfig
from ka_attention.hf.support import attention_modules

ATTENTION_RATE = 3.0  # learning rate of attention layers over that of the others: they have the most to learn anew
GATE_RATE = 0.05  # learning rate of free gates: numbers of order 1 that have to cross [0, 1] in few steps


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How a model is converted.

    steps, batch_size, learning_rate: AdamW, cosine schedule, gradients clipped to norm 1; attention layers learn at
             ATTENTION_RATE times the rate.
    target:  "ka" raises every gate to 1 on a schedule; "learned" leaves one gate per head free, started at 0; "softmax"
             keeps the gates at 0, which is the control: the same training without KA-attention.
    window:  attend to the last ``window`` tokens only.
    stage_one: share of the steps that follow the softmax model.
    ramp:    share of the steps over which scheduled gates rise from 0 to 1, linearly.
    """

    steps: int
    batch_size: int = 4
    learning_rate: float = 1e-3
    target: Literal["ka", "learned", "softmax"] = "ka"
    window: int | None = None
    stage_one: float = 0.8
    ramp: float = 0.1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {getattr(self, name)}")
        if self.target not in ("ka", "learned", "softmax"):
            raise ValueError(f"target: expected 'ka', 'learned' or 'softmax', got {self.target!r}")
        for name in ("stage_one", "ramp"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share between 0 and 1, got {getattr(self, name)}")

    def gate(self, step: int) -> float:
        """The scheduled gate after ``step`` steps: 0 before the first, 1 from the end of the ramp on."""
        if self.target == "softmax" or step == 0:
            return 0.0
        return min(1.0, step / max(1.0, self.ramp * self.steps))

    def follows(self, step: int) -> bool:
        """Whether step number ``step`` (from 0) follows the softmax model."""
        return step < round(self.stage_one * self.steps)

    def result(self) -> KAConfig:
        """The configuration of the converted model."""
        if self.target == "learned":
            return KAConfig(window=self.window, gate="head", gate_init=0.0)
        return KAConfig(window=self.window, gate_init=1.0 if self.target == "ka" else 0.0)


def set_gates(model: Any, gates: float | Tensor) -> None:
    """Set the gates of a model attached with ``KAConfig(gate="head")``: a number, or ``[L, Hq]``, one a head."""
    with torch.no_grad():
        for i, module in enumerate(attention_modules(model)):
            value = gates[i] if isinstance(gates, Tensor) else torch.tensor(gates)
            module.ka_gate.bias.copy_(value.expand_as(module.ka_gate.bias))


@contextmanager
def layer_outputs(model: Any) -> Iterator[list[Tensor]]:
    """A list that a forward pass extends by what each layer's attention adds to the stream, ``[B, T, hidden]``."""
    found: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda _, __, out: found.append(out[0])) for m in attention_modules(model)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def convert(
    model: Any,
    train_set: Dataset,
    conversion: Conversion,
    folder: Path,
    *,
    seed: int = 0,
    evaluations: int = 1,
    perplexity: Callable[[Any], float] | None = None,
    on_step: Callable[[], Any] = lambda: None,
) -> list[dict[str, Any]]:
    """Convert a softmax ``model``, in place: at return it is attached with ``conversion.result()`` and trained.

    train_set:  a torch data set of ``{"input_ids", "labels"}``, read in an order that depends on ``seed`` alone.
    folder:     for checkpoints, ``evaluations`` times a conversion; the same call after a kill goes on from the last.
                With ``evaluations=0`` nothing is kept and no rows are returned.
    perplexity: called with the model at each of these moments; the rows returned hold ``step``, ``gate`` (the mean),
                and what it gave as ``ppl``.

    Half-precision weights become float32: in bfloat16 most steps are too small to change a weight, in float16 they
    overflow. UserError where a loss or a gradient is not finite: ``model`` then holds the weights of the step before,
    which are saved as ``folder / "last-good"`` too.
    """
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        model.float()
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    scheduled = conversion.target == "ka"
    attach(model, KAConfig(window=conversion.window, gate="head", gate_init=0.0) if scheduled else conversion.result())
    for module in attention_modules(model) if scheduled else []:
        module.ka_gate.bias.requires_grad_(False)
    trainer = _Trainer(model, teacher, train_set, conversion, folder, seed, evaluations, perplexity, on_step)
    try:
        trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    except NotFiniteError as error:
        kept = "nothing is kept"
        if evaluations:
            model.save_pretrained(folder / "last-good", is_main_process=trainer.args.should_save)
            kept = f"the weights of the step before are in {folder / 'last-good'}"
        rate = f"try a learning rate below {conversion.learning_rate:g}"
        raise UserError(f"convert: {error} in step {trainer.state.global_step + 1}, {kept}; {rate}") from None
    if scheduled:
        detach(model)
        attach(model, conversion.result())
    return [entry for entry in trainer.state.log_history if "gate" in entry]


class _Trainer(Trainer):
    """Trainer with two losses and gates on a schedule; all of its own state is the step, so a checkpoint resumes it."""

    def __init__(
        self,
        model: Any,
        teacher: Any,
        train_set: Dataset,
        conversion: Conversion,
        folder: Path,
        seed: int,
        evaluations: int,
        perplexity: Callable[[Any], float] | None,
        on_step: Callable[[], Any],
    ) -> None:
        cuda = torch.cuda.is_available()
        when = "steps" if evaluations else "no"
        every = max(1, conversion.steps // max(1, evaluations))
        arguments = TrainingArguments(
            output_dir=str(folder),
            seed=seed,
            data_seed=seed,
            max_steps=conversion.steps,
            learning_rate=conversion.learning_rate,
            lr_scheduler_type="cosine",
            dataloader_drop_last=True,
            dataloader_pin_memory=cuda,
            use_cpu=not cuda,
            bf16=cuda,
            eval_strategy=when,
            eval_steps=every,
            save_strategy=when,
            save_steps=every,
            save_total_limit=1,
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        arguments.per_device_train_batch_size = max(1, conversion.batch_size // arguments.world_size)
        super().__init__(
            model, arguments, train_dataset=train_set, eval_dataset=train_set, callbacks=[_OnStep(on_step)]
        )
        self.remove_callback(PrinterCallback)
        self.network, self.teacher, self.conversion, self.perplexity = model, teacher, conversion, perplexity
        teacher.to(self.args.device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        modules, rate = attention_modules(self.network), self.args.learning_rate
        gates = {id(p): p for m in modules if hasattr(m, "ka_gate") for p in m.ka_gate.parameters()}
        attention = {id(p): p for m in modules for p in m.parameters() if id(p) not in gates}
        others = {id(p): p for p in self.network.parameters() if id(p) not in gates | attention}
        groups = [
            {"params": [p for p in group.values() if p.requires_grad], "lr": lr, "weight_decay": decay}
            for group, lr, decay in (
                (others, rate, 0.01),
                (attention, ATTENTION_RATE * rate, 0.01),
                (gates, GATE_RATE, 0.0),
            )
        ]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
        return self.optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        loss = self._loss(model, inputs)
        require_finite(loss=loss)
        return loss

    def _loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        step = self.state.global_step
        if self.conversion.target == "ka":
            set_gates(self.network, self.conversion.gate(step + 1))
        if not self.conversion.follows(step):
            return model(**inputs).loss
        with layer_outputs(self.teacher) as wanted, torch.no_grad():
            target = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits
        with layer_outputs(self.network) as found:
            logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
        errors = [(s - t).float().square().sum() / t.float().square().sum() for s, t in zip(found, wanted, strict=True)]
        student, target = (x.float().log_softmax(-1).flatten(0, -2) for x in (logits, target))
        return torch.stack(errors).mean() + F.kl_div(student, target, reduction="batchmean", log_target=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Weights under the model's own names: the Trainer does not undo transformers' renaming when it resumes."""
        if self.args.should_save:
            path = Path(str(output_dir or self.args.output_dir))
            path.mkdir(parents=True, exist_ok=True)
            save_model(self.network, str(path / "model.safetensors"))

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        if any(row["step"] == self.state.global_step for row in self.state.log_history):
            return {}  # the Trainer evaluates its last step twice
        gates = [m.ka_gate(None).mean() for m in attention_modules(self.network) if hasattr(m, "ka_gate")]
        row = {"step": self.state.global_step, "gate": torch.stack(gates).mean().item() if gates else 0.0}
        if self.perplexity is not None:
            with self.compute_loss_context_manager():
                row["ppl"] = self.perplexity(self.network)
        self.state.log_history.append(row)
        return {}


class _OnStep(TrainerCallback):
    def __init__(self, on_step: Callable[[], Any]) -> None:
        self.on_step = on_step

    def on_pre_optimizer_step(self, *_: Any, **settings: Any) -> None:
        require_finite(gradient=[p.grad for p in settings["model"].parameters() if p.grad is not None])

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.on_step()
