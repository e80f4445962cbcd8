"""The hybrid study: a tiny run in two processes, continued with more arms and seeds; its report; what is refused."""

import json
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from ka_attention.errors import UserError
from ka_attention.harness.run import study, workers
from ka_attention.harness.run.records import from_json
from ka_attention.harness.run.settings import override
from ka_attention.harness.run.store import Store
from ka_attention.harness.tasks.learning import NOT_ASKED, Plan, build
from ka_attention.harness.tasks.statements import Depo
from ka_attention.studies.hybrid import tasks as task_module
from ka_attention.studies.hybrid.recipes import RECIPES, TASKS
from ka_attention.studies.hybrid.results import HybridResults, TrainedArm
from ka_attention.studies.hybrid.study import HYBRID, decode, read, train_arm
from ka_attention.studies.hybrid.tasks import TaskArm, settings, tasks

SETTINGS = """vocab_size=512 hidden_size=32 heads=2 intermediate_size=320 layers=4 sequence_length=32 batch_size=2
train_tokens=512 validation_sequences=4 evaluations=2 warmup_steps=2 arms=full-gated,3to1-ka-head-w4-gated
task_arms=1to1-ka-head-w4-gated task_layers=2 task_samples=64 task_length=8 task_hops=3"""
TINY = override(RECIPES["quick"], SETTINGS.split())


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """Processes that need not import everything anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "START", "fork")
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The recipe and the folder of a run: two arms side by side, then one more arm and another seed."""
    folder = tmp_path_factory.mktemp("hybrid")
    text = folder / "text.txt"
    text.write_text("\n".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs" for i in range(400)))
    recipe = replace(TINY, data=str(text), gpus=2)
    store = study.open_store(HYBRID, recipe, folder / "out")
    HYBRID.run(recipe, store, 1)
    recipe = replace(
        recipe, gpus=1, arms=(*recipe.arms, "3to1-softmax-w4-gated", "3to1-softmax-w2-gated", "3to1-none-gated")
    )
    store = study.open_store(HYBRID, recipe, folder / "out")
    study.publish(HYBRID, recipe, store, 2, HYBRID.run(recipe, store, 2))
    return recipe, folder / "out"


def test_arms_are_trained_and_decoded(run):
    recipe, out = run
    results = json.loads((out / "results.json").read_text())
    assert list(results["arms"]) == list(results["decoding"]) == list(recipe.arms)
    for name, seeds in results["arms"].items():
        assert [one["training"]["rows"][-1]["tokens"] for one in seeds] == [512, 512]
        assert (seeds[0]["ungated_loss"] is not None) == ("-ka-" in name)
        decoding = results["decoding"][name]
        assert decoding["computed_bytes"] == decoding["measured_bytes"]
        assert decoding["seconds"] > 0
    gates = results["arms"]["3to1-ka-head-w4-gated"][0]["gates"]
    assert {layer: len(heads) for layer, heads in gates.items()} == {"0": 2, "1": 2, "2": 2}
    bytes_ = {name: each["computed_bytes"] for name, each in results["decoding"].items()}
    token = 2 * 32 * 4
    assert bytes_ == {
        "full-gated": 4 * 32 * token,
        "3to1-ka-head-w4-gated": (32 + 3 * 3) * token,
        "3to1-softmax-w4-gated": (32 + 3 * 3) * token,
        "3to1-softmax-w2-gated": (32 + 3) * token,
        "3to1-none-gated": 32 * token,
    }


@pytest.mark.parametrize("name", ["3to1-softmax-w1", "all-ka-w1", "canon", "3to1-gdn-gated", "3to1-mamba2"])
def test_states_are_as_large_as_computed(name):
    found = decode(replace(TINY, decode_batch=3), name)
    assert found.measured_bytes == found.computed_bytes


def test_the_report_compares_arms_and_shows_gates(run):
    page = (run[1] / "report.md").read_text()
    assert "All arms have output gates in every layer." in page
    assert "output gate |" not in page
    softmax, _, peers = page.partition("## Differences")[2].partition("the best of each other kind")
    assert "| 3:1 KA, window 4 | " in softmax
    assert "| 3:1 softmax, window " in peers
    assert "| 3:1 no mixing | " in peers
    assert "| 3:1 KA, window 4 | " in page.partition("gates set to 0 after training")[2]
    assert "gates after training (mean over seeds)" in page
    assert "| window | 3:1 softmax |" in page
    for name in ("kinds", "state", "training", "windows", "decoding", "way", "position", "gates"):
        assert (run[1] / "figures" / f"hybrid_{name}.svg").exists()


def _stored(out, change):
    """The results of a run with a change."""
    stored = json.loads((out / "results.json").read_text())
    change(stored)
    return from_json(HybridResults, {f.name: stored[f.name] for f in fields(HybridResults)}, "results")


def test_times_beside_other_work_are_not_shown(run):
    recipe, out = run

    def change(stored):
        for one in stored["arms"]["3to1-none-gated"]:
            one["alone"] = False

    table = HYBRID.sections(recipe, _stored(out, change))[0].tables[0]
    timed = {row[0]: row[table.columns.index("1,000 tokens/s")] for row in table.rows}
    assert timed["3:1 no mixing"] == "–"
    assert "–" not in timed["full softmax"]


def test_the_report_of_one_seed_leaves_out_what_nobody_measured(run):
    recipe, out = run
    kept = ("full-gated", "3to1-ka-head-w4-gated", "3to1-softmax-w4-gated")

    def change(stored):
        stored["arms"] = {name: stored["arms"][name][:1] for name in kept}
        stored["decoding"] = {name: stored["decoding"][name] | {"seconds": None} for name in kept}
        for i, name in enumerate(("full-gated", "3to1-softmax-w4-gated", "3to1-ka-head-w4-gated")):
            stored["arms"][name][0]["training"]["rows"][-1]["loss"] = 3.0 - i / 8
            stored["rates"][name] = {"0.004": [3.0 - i / 8]}
            stored["arms"][name][0]["alone"] = False

    summary, compared, *_ = HYBRID.sections(recipe, _stored(out, change))
    assert summary.paragraphs[0].startswith(
        "**3:1 KA, window 4** has the lowest loss, 2.750 nats (one seed): 0.250 below full softmax, at 32 % of its"
    )
    assert (
        "The nearest arm of another kind is 3:1 softmax, window 4, 0.125 above it in one seed: undecided."
        in (summary.paragraphs[0])
    )
    assert summary.tables[0].columns == ["arm", "state (KiB)", "loss (nats)", "against full softmax"]
    assert [figure.name for figure in summary.figures] == ["hybrid_kinds", "hybrid_state"]
    assert [[row[1] for row in table.rows] for table in compared.tables] == [["−0.1250"], ["−0.1250", "−0.2500"]]


def test_an_arm_alone_is_not_compared(run):
    recipe, out = run

    def change(stored):
        stored["arms"], stored["decoding"] = ({"full-gated": stored[key]["full-gated"]} for key in ("arms", "decoding"))

    made = HYBRID.sections(recipe, _stored(out, change))
    assert [section.title for section in made] == ["Hybrids", "On the way", "By position", "Tasks"]
    assert not any(section.figures for section in made[:3])
    assert made[0].paragraphs[0].startswith("One arm reads text, **full softmax**")


def test_a_permutation_is_walked():
    task = Depo(nodes=20, hops=5)
    found = task.examples(16, 24, np.random.default_rng(0))
    for statements, answers, groups in zip(*(x.tolist() for x in found), strict=True):
        arrow = dict(divmod(statement, task.symbols) for statement in statements[:12])
        assert len(arrow) == len(set(arrow.values())) == 12
        for statement, answer, k in zip(statements[12:], answers[12:], groups[12:], strict=True):
            node, hops = divmod(statement, task.symbols)
            assert hops == task.nodes + k - 1
            for _ in range(k):
                node = arrow[node]
            assert answer == node
        assert set(answers[:12]) == {NOT_ASKED}
        walked = [statements[0] // task.symbols]
        for _ in range(12):
            walked.append(arrow[walked[-1]])
        assert len(set(walked)) == 12  # one cycle
        assert walked[0] == walked[-1]


def test_tasks_are_learned_by_models_of_the_arm(run):
    results = json.loads((run[1] / "results.json").read_text())
    assert [entry["task"] for entry in results["tasks"].values()] == ["dereference", "depo"]
    for entry in results["tasks"].values():
        assert [test["length"] for test in entry["seeds"][0]["tests"]] == [8, 24]
    assert "## Tasks" in (run[1] / "report.md").read_text()
    model = build(Plan("depo", Depo(12, 3), TaskArm("1to1-ka-head-w4-gated", ""), 2), settings(TINY), 0)
    assert hasattr(model.model.layers[0].self_attn, "ka_gate")
    assert not hasattr(model.model.layers[1].self_attn, "ka_gate")
    assert model(input_ids=torch.tensor([[0, 15 * 15 - 1]])).logits.shape == (1, 2, 15)


def test_gates_of_fast_arms_move_further_on_text(run, tmp_path):
    recipe = run[0]
    text = read(recipe, Store(tmp_path / "text", {}))

    def moved(name):
        gates = train_arm(recipe, name, recipe.learning_rate, 0, text, tmp_path).gates
        return max(abs(gate) for heads in gates.values() for gate in heads)

    assert moved("3to1-ka-head-w4-from0-fast-gated") > 3 * moved("3to1-ka-head-w4-from0-gated") > 0


@pytest.mark.parametrize(("name", "rate"), [("1to1-ka-head-w4-fast-gated", 10.0), ("1to1-ka-head-w4-gated", 1.0)])
def test_gates_of_fast_arms_have_their_rate_on_tasks(name, rate, monkeypatch):
    def made(model, settings, *, gate_rate):
        raise InterruptedError(gate_rate)

    monkeypatch.setattr(task_module, "adamw", made)
    plan = Plan("depo", Depo(12, 3), TaskArm(name, ""), 2)
    with pytest.raises(InterruptedError, match=f"^{rate}$"):
        task_module._learn(plan, settings(TINY), None, "", 0)


def test_every_task_has_examples_at_three_times_the_length():
    recipe = replace(TINY, tasks=TASKS, task_length=16)
    for task in tasks(recipe).values():
        for length in (16, 48):
            found = task.examples(4, length, np.random.default_rng(0))
            assert found.statements.shape == (4, length)
            assert found.statements.max() < task.symbols**2


def test_seeds_that_were_trained_before_count(run):
    recipe, out = run
    found = HYBRID.run(recipe, Store(out, {}), 1)
    assert {len(seeds) for seeds in found.arms.values()} == {2}


def test_an_arm_that_was_trained_on_other_tokens_is_refused(run, tmp_path):
    recipe, out = run
    shutil.copytree(out, tmp_path / "out")
    fewer = read(recipe, Store(tmp_path / "out", {}))
    fewer = replace(fewer, train=replace(fewer.train, tokens=fewer.train.tokens - 1))
    other = train_arm(recipe, "full-gated", recipe.learning_rate, 1, fewer, tmp_path)
    part = f"full-gated/{recipe.learning_rate:g}/seed1"
    (tmp_path / "out" / "parts" / f"{part}.json").unlink()
    store = Store(tmp_path / "out", {})

    def brought() -> TrainedArm:
        return other

    store.part(part, brought)
    with pytest.raises(UserError, match="full-gated was trained on another text"):
        HYBRID.run(recipe, store, 1)


def test_another_text_is_refused(run, tmp_path):
    recipe, out = run
    other = tmp_path / "other.txt"
    other.write_text("all work and no play makes a dull text\n" * 400)
    for file in (out / "tokens").glob("*"):
        file.unlink()
    with pytest.raises(UserError, match="not the text with which the run"):
        HYBRID.run(replace(recipe, data=str(other)), Store(out, {}), 1)


def test_each_arm_takes_the_rate_that_is_best_for_its_first_seed(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs" for i in range(400)))
    recipe = replace(TINY, data=str(text), arms=("full", "3to1-softmax-w4"), task_arms=(), rates=(1e-4, 1.0))
    rate = recipe.learning_rate
    found = HYBRID.run(recipe, Store(tmp_path / "out", {}), 2)
    for name, runs in found.arms.items():
        assert [one.training.learning_rate for one in runs] == [rate, rate]
        assert found.rates[name][rate] == tuple(one.loss for one in runs)
        (other,) = found.rates[name][rate * 1e-4]  # the second seed had the best rate alone
        assert other > found.rates[name][rate][0]
    sections = HYBRID.sections(recipe, found)
    assert "with several learning rates" in " ".join(sections[0].paragraphs)
    (table,) = next(section for section in sections if section.title == "Learning rates").tables
    assert table.columns == ["arm", "its rate", f"{rate * 1e-4:g}", f"{rate:g}"]
    assert {row[1] for row in table.rows} == {f"{rate:g}"}

    more = replace(recipe, rates=(1e-4, 1.0, 2e-4))  # a rate more trains seed 0 with it, and nothing else
    before = set((tmp_path / "out").rglob("seed*.json"))
    again = HYBRID.run(more, Store(tmp_path / "out", {}), 2)
    new = [path.parts[-2:] for path in set((tmp_path / "out").rglob("seed*.json")) - before]
    assert new == [(f"{rate * 2e-4:g}", "seed0.json")] * len(recipe.arms)
    assert again.arms == found.arms


def _fails(kind: str) -> int:
    if kind == "refused":
        raise UserError("--set nothing: as the test wants it")
    raise ArithmeticError("as the test wants it")


@pytest.mark.parametrize(("kind", "error"), [("refused", UserError), ("failed", RuntimeError)])
def test_a_part_that_fails_in_a_worker_is_said(kind, error, tmp_path):
    parts = [workers.Part(f"{kind}/{i}", _fails, (kind,)) for i in range(2)]
    with pytest.raises(error, match="as the test wants it"):
        workers.finish(parts, Store(tmp_path, {}), 2)


def test_what_a_run_may_change_is_no_setting():
    with pytest.raises(UserError, match=r"^--set: no setting 'choices'; (?!.*, choices)"):
        override(TINY, ["choices=arms"])


@pytest.mark.parametrize(
    "setting",
    ["arms=full,full", "arms=window", "hidden_size=20", "rates=1,1", "rates=0", "train_tokens=5", "tasks=chess"],
)
def test_settings_that_make_no_sense_are_refused(setting):
    with pytest.raises(UserError, match=f"^--set {setting.partition('=')[0]}:"):
        override(TINY, [setting])


@pytest.mark.parametrize(
    "setting", ["task_arms=window", "task_size=65", "task_samples=1", "task_layers=0", "task_length=0", "task_hops=0"]
)
def test_settings_of_tasks_are_refused_under_their_names_and_before_any_text(setting):
    with pytest.raises(UserError, match=f"^--set {setting.partition('=')[0]}:"):
        override(TINY, [setting])
