"""Progress bars: those of parts stand below that of the run, and only a terminal shows any."""

import io

from rich.console import Console

from ka_attention.harness.run import progress
from ka_attention.harness.run.store import Store
from ka_attention.report.document import Table


def terminal(**options):
    return Console(file=io.StringIO(), width=60, **options)


def test_a_bar_within_a_bar_stands_below_it_and_a_note_may_come_meanwhile(tmp_path):
    console = terminal(force_terminal=True)
    with progress.bar("all parts", 2, console=console) as advance:
        (display,) = progress._open
        with console.status("asking"), progress.bar("training", 5, console=console) as step:
            step(3)
            assert [(task.description, task.completed, task.total) for task in display.tasks] == [
                ("all parts", 0, 2),
                ("training", 3, 5),
            ]
            display.refresh()
        store = Store(tmp_path, {})
        store.on_part = advance
        store.part("x", lambda: 1)
        store.part("x", lambda: 2)
        assert [(task.description, task.completed) for task in display.tasks] == [("all parts", 2)]
    assert not progress._open
    assert "training" in console.file.getvalue()


def test_without_a_terminal_there_is_no_bar():
    console = terminal()
    with progress.bar("all parts", 2, console=console) as advance, progress.bar("training", 5, console=console) as step:
        step(1)
        advance(1)
    assert console.file.getvalue() == "\n" or not console.file.getvalue()


def test_a_table_of_a_report_is_printed_as_it_is():
    console = terminal()
    progress.show(Table("What came", ["arm", "PPL"], [["[bold]KA", "61.5"]]), console=console)
    shown = console.file.getvalue()
    for word in ("What came", "arm", "PPL", "[bold]KA", "61.5"):
        assert word in shown
