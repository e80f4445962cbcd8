"""What the report of the hybrid study compares: KA with softmax, the best KA with its peers, an arm with and without
a part. All differences are paired by seed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ka_attention.harness.figures.statistics import interval, mean, verdict
from ka_attention.report.document import Section, Table
from ka_attention.studies.hybrid.labels import Labels
from ka_attention.studies.hybrid.models import FAST, HybridArm
from ka_attention.studies.hybrid.results import HybridResults

Arms = dict[str, HybridArm]
ENOUGH = 3  # seeds with which arms count alike, whatever more they have
PARTS = {  # the words of a part: the same arm without it
    "conv qkv": ("convolution", "qkv", None),
    "conv in front": ("convolution", "front", None),
    "biases on q, k": ("bias", True, False),
    "norms on q, k": ("normed", True, False),
    "output gates": ("output_gate", True, False),
    "gates from 0": ("start", 0.0, 0.5),
    "gates from 0 to 1": ("start", "spread", 0.5),
    "fast gates": ("gate_rate", FAST, 1.0),
    "start at random": ("start", "drawn", 0.0),
}


def first_arm(results: HybridResults) -> str:
    """The arm that the others are compared with."""
    return next(iter(results.arms))


def paired(results: HybridResults, name: str, other: str) -> list[float]:
    """Losses of one arm less those of another, for the seeds that both have, counted from 0."""
    pairs = zip(results.arms[name], results.arms[other], strict=False)
    return [one.loss - base.loss for one, base in pairs]


def paired_alike(results: HybridResults, name: str, other: str) -> list[float]:
    """As ``paired``, but each with the best of the learning rates that both were trained with; [] if there is none."""
    tried = results.rates[name], results.rates[other]
    common = tried[0].keys() & tried[1].keys()
    if not common:
        return []
    best_of_each = [min((losses[rate] for rate in common), key=lambda found: found[0]) for losses in tried]
    return [a - b for a, b in zip(*best_of_each, strict=False)]


def difference(numbers: Iterable[float], digits: int = 4) -> str:
    """``−0.0182 ± 0.0139 *``: mean and 95 % confidence interval, * where that leaves out 0; one seed: ``−0.0040``."""
    numbers = list(numbers)
    middle, half = interval(numbers)
    text = f"{round(middle, digits) + 0.0:+.{digits}f}".replace("-", "−")
    if half is None:
        return text
    return f"{text} ± {half:.{digits}f}" + (" *" if verdict(numbers) in ("lower", "higher") else "")


def best(results: HybridResults, names: Iterable[str]) -> str:
    """Of some arms the one with the lowest loss, among those of them with the most seeds, or ENOUGH.

    Losses are means over all seeds of an arm, as tables have them.
    """
    losses = {name: [one.loss for one in results.arms[name]] for name in names}
    return min(losses, key=lambda name: (-min(len(losses[name]), ENOUGH), mean(losses[name])))


def kind_of(each: HybridArm) -> tuple[str, ...]:
    """Arms of one kind have the same mixer, convolutions, norms and output gates; "" stands for what is usual."""
    return each.mixer, each.convolution or "", "normed" if each.normed else "", "" if each.output_gate else "plain"


def leading(results: HybridResults, arms: Arms) -> list[str]:
    """The best arm of each kind."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for name, each in arms.items():
        kinds.setdefault(kind_of(each), []).append(name)
    return [best(results, names) for names in kinds.values()]


def beside_softmax(arms: Arms) -> list[tuple[str, str]]:
    """Arms with KA, each with the one that has softmax in KA's place and is else alike; by window, hybrids first."""
    names = {each: name for name, each in arms.items()}
    twins = {
        name: replace(each, mixer="softmax", gate="fixed", start=0.0, gate_rate=1.0) for name, each in arms.items()
    }
    found = [(name, names[twin]) for name, twin in twins.items() if arms[name].mixer == "ka" and twin in names]
    return sorted(found, key=lambda pair: (arms[pair[0]].pattern == "all", arms[pair[0]].windows(99)))


def section(results: HybridResults, arms: Arms, labels: Labels) -> Section | None:
    """KA beside softmax; the best KA beside its peers; what parts do."""
    made = (_softmax(results, arms, labels), _peers(results, arms, labels), _parts(results, arms, labels))
    tables = [table for table in made if table]
    if not tables:
        return None
    words = [
        "Losses paired by seed, in nats: below 0 the first has the lower loss. ± is a 95 % confidence interval over "
        "the seeds that both have (Student's t), and * says that 0 lies outside it. Without ± there is one seed, and "
        "nothing is known of the spread. Nothing is corrected for multiple comparisons: of twenty differences that are "
        "none, one has a * by chance."
    ]
    return Section("Differences", words, tables)


def _softmax(results: HybridResults, arms: Arms, labels: Labels) -> Table | None:
    rows = []
    for name, other in beside_softmax(arms):
        if found := paired_alike(results, name, other):
            rows.append([labels(arms[name]), difference(found), str(len(found))])
    caption = f"KA less softmax in its place: the same window, all else alike{_at_rates(results)}"
    return Table(caption, ["arm with KA", "less softmax", "seeds"], rows) if rows else None


def _peers(results: HybridResults, arms: Arms, labels: Labels) -> Table | None:
    leaders = leading(results, arms)
    ka = [name for name in leaders if arms[name].mixer == "ka"]
    gated = {arms[name].output_gate for name in ka}
    others = [name for name in leaders if arms[name].mixer != "ka" and arms[name].output_gate in gated]
    if not others:
        return None
    others.sort(key=lambda name: -mean(paired(results, ka[0], name)))

    def compared(name: str, other: str) -> str:
        alike = arms[name].output_gate == arms[other].output_gate
        return difference(paired(results, name, other)) if alike else "–"

    rows = [[labels(arms[other]), *(compared(name, other) for name in ka)] for other in others]
    caption = (
        "The best with KA (columns) less the best of each other kind (rows). Arms of a kind have the same mixer, "
        "convolutions, norms and output gates; the best of them has the lowest loss among those with the most seeds, "
        f"or with {ENOUGH}"
    )
    return Table(caption, ["best of its kind", *(labels(arms[name]) for name in ka)], rows)


def _parts(results: HybridResults, arms: Arms, labels: Labels) -> Table | None:
    names = {each: name for name, each in arms.items()}
    rows = []
    for part, (attribute, value, without) in PARTS.items():
        for name, each in arms.items():
            other = names.get(replace(each, **{attribute: without}))  # type: ignore[arg-type]
            if getattr(each, attribute) != value or other in (None, name):
                continue
            if found := paired_alike(results, name, other):
                rows.append([part, labels(arms[other]), difference(found), str(len(found))])
    caption = f"What a part does: the arm with it less the arm without it{_at_rates(results)}"
    return Table(caption, ["part", "arm without it", "difference", "seeds"], rows) if rows else None


def _at_rates(results: HybridResults) -> str:
    several = any(len(losses) > 1 for losses in results.rates.values())
    return "; each has the best of the learning rates that both were trained with" if several else ""
