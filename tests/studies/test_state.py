"""The state study: labels against plain evaluators, hand-made solvers, the report."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ka_attention.errors import UserError
from ka_attention.harness.run.settings import override
from ka_attention.harness.run.store import Store
from ka_attention.harness.tasks.learning import Exam, Score
from ka_attention.ops import ka_attention
from ka_attention.studies.state.recipes import RECIPES, Product, Slots, state_arm
from ka_attention.studies.state.report import Results
from ka_attention.studies.state.study import STATE


def examples(task, count=32, length=23):
    return task.examples(count, length, np.random.default_rng(0))


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_products_are_what_applying_the_permutations_gives(degree):
    task = Product(degree)
    group = list(permutations(range(degree)))
    for statements, answers, positions in zip(*(x.tolist() for x in examples(task)), strict=True):
        state = tuple(range(degree))
        for statement, answer in zip(statements, answers, strict=True):
            factor = group[statement % task.symbols]
            state = tuple(factor[thing] for thing in state)  # first what was, then the factor
            assert group[answer] == state
        assert positions == list(range(23))
        assert [statement // task.symbols for statement in statements] == [1] + [0] * 22


def test_products_of_two_are_parity():
    found = examples(Product(2))
    assert torch.equal(found.answers, (found.statements % 2).cumsum(1) % 2)


@pytest.mark.parametrize("degree", [2, 5])
def test_slots_hold_what_a_plain_evaluator_puts_there(degree):
    task = Slots(degree)
    for statements, answers, _ in zip(*(x.tolist() for x in examples(task)), strict=True):
        held, before = {}, {}
        for t, (statement, answer) in enumerate(zip(statements, answers, strict=True)):
            if t % degree == 0:
                before = dict(held)
            slot, right = divmod(statement, task.symbols)
            assert slot == t % degree
            held[slot] = before[right] if right < degree else right
            assert held[slot] == answer


def test_one_windowed_ka_layer_made_by_hand_tracks_every_permutation_and_softmax_one_step():
    n = 5
    task = Slots(n)
    found = examples(task, length=100)
    slot, right = found.statements // task.symbols, found.statements % task.symbols
    # Keys are positions modulo two steps; a statement looks for its source in the step before, a thing for itself.
    position = torch.arange(100)
    source = torch.where(right < n, position - slot - n + right, position)
    q = 50.0 * F.one_hot(source % (2 * n), 2 * n).double()[:, None]
    k = F.one_hot(position % (2 * n), 2 * n).double().expand(32, 1, -1, -1)
    v = (F.one_hot(right, 2 * n) * (right >= n)[..., None]).double()[:, None]
    for gate, steps in ((1.0, 20), (0.0, 2)):
        a = ka_attention(q, k, v, gate=gate, scale=1.0, window=2 * n)[:, 0]
        right_here = (a.argmax(-1) == found.answers) & (a.amax(-1) > 0.5)
        assert torch.equal(right_here, (position < steps * n).expand_as(right_here))


def test_a_signed_gate_made_by_hand_flips_a_parity_and_gates_from_0_to_1_cannot():
    bits = torch.randint(2, (16, 1, 40), generator=torch.Generator().manual_seed(0)).double()
    gate = 1 - 2 * bits
    zeros = torch.zeros(16, 1, 40, 1, dtype=torch.float64)
    v = zeros.clone()
    v[:, :, 0] = 1.0  # a mark at the start; every other token carries on what the one before it holds
    a = ka_attention(zeros, zeros, v, gate=gate, window=2)[..., 0]
    parity = bits[..., 1:-1].cumsum(-1) % 2
    # Even scores halve what is carried at each step; its sign is the parity of the bits between.
    torch.testing.assert_close(a[..., 2:] * 2.0 ** torch.arange(2, 40), 1 - 2 * parity)
    assert (ka_attention(zeros, zeros, v, gate=gate.clamp(min=0), window=2) >= 0).all()


def test_a_tiny_run_is_reported(tmp_path):
    settings = "layers=1 arms=softmax,ka-signed-w tasks=parity,s3-slots least_seeds=1 length=6 test_lengths=6,9"
    recipe = override(RECIPES["quick"], [*settings.split(), "hidden_size=16", "train_samples=64", "test_samples=32"])
    results = STATE.run(recipe, Store(tmp_path, {}), 1)
    (section,) = STATE.sections(recipe, results)
    assert [len(table.rows) for table in section.tables] == [2, 2]
    assert "50.0 %" in section.tables[0].caption
    assert "33.3 %" in section.tables[1].caption
    assert section.paragraphs[-1].startswith("**Came**")
    solved = Exam(1, 1.0, (Score(6, 1.0, ()), Score(9, 0.6, ())))
    arms = results.arms | {"parity/softmax/1": replace(results.arms["parity/softmax/1"], seeds=(solved,))}
    assert "training length only by softmax, 1 layer" in STATE.sections(recipe, Results(arms))[0].paragraphs[-1]


def test_windows_are_two_steps_and_signed_gates_reach_minus_one():
    assert state_arm("ka-w", Slots(5)).ka.window == 10
    assert state_arm("softmax-w", Product(5)).ka.window == 2
    assert state_arm("ka-signed", Product(2)).ka.gate_range == (-1.0, 1.0)


@pytest.mark.parametrize("setting", ["tasks=s4", "layers=0"])
def test_settings_that_make_no_sense_are_refused(setting):
    with pytest.raises(UserError, match=f"--set {setting.partition('=')[0]}"):
        override(RECIPES["quick"], [setting])
