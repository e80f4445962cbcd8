"""The dereference study: labels against a plain evaluator, a hand-made solver, the report."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ka_attention.errors import UserError
from ka_attention.harness.run.settings import override
from ka_attention.harness.run.store import Store
from ka_attention.harness.tasks.learning import reach
from ka_attention.harness.tasks.statements import Dereference
from ka_attention.ops import ka_attention
from ka_attention.studies.dereference.recipes import RECIPES
from ka_attention.studies.dereference.study import DEREFERENCE

TASK = Dereference(names=40, literals=10, chains=4)


def examples(count=64, length=40, seed=0):
    return TASK.examples(count, length, np.random.default_rng(seed))


def test_answers_are_what_a_plain_evaluator_finds():
    found = examples()
    for statements, answers, depths in zip(*(x.tolist() for x in found), strict=True):
        values, hops = {}, {}
        for statement, answer, depth in zip(statements, answers, depths, strict=True):
            left, right = divmod(statement, TASK.symbols)
            assert left < TASK.names
            assert left not in values  # a name is assigned once, and no name is read before
            is_name = right < TASK.names
            values[left], hops[left] = (values[right], hops[right] + 1) if is_name else (right, 0)
            assert (values[left], hops[left]) == (answer, depth)
        assert len(set(values.values())) == TASK.chains


def test_one_ka_layer_made_by_hand_is_always_right_and_one_softmax_layer_only_to_depth_one():
    found = examples()
    left, right = found.statements // TASK.symbols, found.statements % TASK.symbols
    # A statement looks for the definition of its right side. A literal finds itself, and carries its value.
    q = 50.0 * F.one_hot(right, TASK.symbols).double()[:, None]
    is_literal = right >= TASK.names
    literal = F.one_hot(right, TASK.symbols) * is_literal[..., None]
    k = (F.one_hot(left, TASK.symbols) + literal).double()[:, None]
    v = literal.double()[:, None]
    for gate, deepest in ((1.0, int(found.groups.max())), (0.0, 1)):
        a = ka_attention(q, k, v, gate=gate, scale=1.0)[:, 0]
        right_here = (a.argmax(-1) == found.answers) & (a.amax(-1) > 0.5)
        assert torch.equal(right_here, found.groups <= deepest)


def test_chains_grow_long_and_a_guess_is_right_one_time_in_chains():
    found = examples(count=2000)
    assert found.groups.max() > 2 * 40 / TASK.chains
    guess = TASK.names + np.random.default_rng(1).integers(TASK.literals, size=found.answers.shape)
    right = (torch.from_numpy(guess) == found.answers).double().mean().item()
    assert right == pytest.approx(1 / TASK.literals, abs=0.005)
    first = found.answers[:, :1]  # naming one of the sequence's literals is the better guess
    assert (first == found.answers)[:, TASK.chains :].double().mean().item() == pytest.approx(1 / TASK.chains, abs=0.03)


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [({0: 1.0, 1: 0.96, 2: 0.2, 3: 1.0}, 1), ({0: 0.5, 1: 1.0}, -1), ({0: 1.0, 1: 1.0}, 1)],
)
def test_reach_is_the_depth_up_to_which_all_are_solved(accuracies, expected):
    assert reach(accuracies) == expected


def test_a_tiny_run_end_to_end_is_resumed_and_reported(tmp_path):
    settings = (
        "layers=1 arms=softmax,ka-token least_seeds=2 length=6 test_lengths=6,9 chains=2 literals=4 hidden_size=16"
    )
    recipe = override(RECIPES["quick"], [*settings.split(), "train_samples=128", "test_samples=64"])
    results = DEREFERENCE.run(recipe, Store(tmp_path, {}), 1)
    assert list(results.arms) == ["softmax/1", "ka-token/1"]
    for entry in results.arms.values():
        assert [[test.length for test in exam.tests] for exam in entry.seeds] == [[6, 9]] * 2
        assert all(sum(group.count for group in exam.tests[1].groups) == 64 * 9 for exam in entry.seeds)
    assert not list(tmp_path.glob("weights/**/*.safetensors"))
    assert DEREFERENCE.run(recipe, Store(tmp_path, {}), 1) == results

    (section,) = DEREFERENCE.sections(recipe, results)
    assert [row[0] for row in section.tables[0].rows] == ["softmax, 1 layer", "KA, gate per token, 1 layer"]
    assert len(section.figures) == 2
    assert any("**Expected:**" in text for text in section.paragraphs)
    assert any("**Came:**" in text for text in section.paragraphs)
    from matplotlib.figure import Figure

    for figure in section.figures:
        figure.draw(Figure().subplots())


@pytest.mark.parametrize(
    "setting", ["chains=17", "layers=0", "layers=", "length=0", "test_lengths=", "train_samples=3", "hidden_size=12"]
)
def test_settings_that_make_no_sense_are_refused(setting):
    with pytest.raises(UserError, match=f"--set {setting.partition('=')[0]}"):
        override(RECIPES["quick"], [setting])
