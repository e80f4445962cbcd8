"""How a report calls its arms: by what tells them apart; what they share is said once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ka_attention.harness.models.mixers import KERNEL
from ka_attention.studies.hybrid.models import FAST, HybridArm, spelled

OF_KA = ("gate", "start", "gate_rate")  # attributes that KA alone has; the others are of every arm
OF_ALL = ("bias", "normed", "output_gate", "convolution")
WITHOUT = {"gate": "fixed gates", "output_gate": "no output gate"}  # said of exceptions; the others are left to a note


class Labels:
    """Labels of the arms of one report, short: what all have alike, or all with KA, is said once, in ``notes``.

    Of output gates and of KA's gates exceptions are labelled, so that one of them leaves the others' labels alone.
    Two different arms never have one label.
    """

    def __init__(self, arms: Iterable[HybridArm]) -> None:
        self.arms = list(arms)
        found = {key: Counter(each.words[key] for each in self.arms if _has(each, key)) for key in OF_ALL + OF_KA}
        self.shared = {key: next(iter(counts)) for key, counts in found.items() if len(counts) == 1}
        usual = {key: found[key].most_common(1)[0][0] for key in WITHOUT if found[key]}
        self.unsaid = usual | self.shared

    def __call__(self, each: HybridArm, *without: str) -> str:
        """Of one arm; of a group of arms, ``without`` the attributes in which they differ."""
        said = []
        for key, words in each.words.items():
            if key in self.unsaid and _has(each, key):
                words = "" if words == self.unsaid[key] else words or WITHOUT[key]
            said.append("" if key in without else words)
        return spelled(said)

    def notes(self) -> str:
        """What labels do not say, and what their short words mean."""
        convolved = {each.convolution for each in self.arms}
        mixers = {each.mixer for each in self.arms}
        unless = "" if "output_gate" in self.shared else " unless a label says otherwise"
        words = {
            "bias": "biases on queries and keys",
            "normed": "norms on queries and keys",
            "output_gate": f"output gates in every layer{unless}",
        }
        common = [text for key, text in words.items() if self.unsaid.get(key)]
        if self.shared.get("convolution"):
            common.append(self.shared["convolution"].removeprefix("+ "))
        notes = [f"All arms have {' and '.join(common)}."] if common else []
        if pattern := max((each.pattern for each in self.arms if each.pattern != "all"), default=""):
            narrow = pattern.partition("to")[0]
            layers = "layer" if narrow == "1" else "layers"
            notes.append(f"*{narrow}:1*: {narrow} {layers} of what is named to one of full softmax attention.")
        if any(each.window for each in self.arms):
            notes.append("A window counts the token itself.")
        if "ka" in mixers:
            notes += self._gates()
        if any(each.gate_rate == FAST for each in self.arms):
            fast = "Its gates have" if self.shared.get("gate_rate") else "*fast gates* have"
            notes.append(f"{fast} {FAST:g} times the learning rate of the weights.")
        if "qkv" in convolved:
            own = [name for mixer, name in (("gdn", "Gated DeltaNet"), ("mamba2", "Mamba-2")) if mixer in mixers]
            besides = f" ({' and '.join(own)} layers have their own in any case)" if own else ""
            notes.append(
                f"*conv qkv*: causal depthwise convolutions over {KERNEL} tokens on the queries, keys and values of "
                f"every attention layer{besides}."
            )
        if not self.shared.get("normed") and any(each.normed for each in self.arms):
            notes.append("*norms on q, k*: an RMSNorm a head in every attention layer (QK norm).")
        if "front" in convolved:
            notes.append(
                f"*conv in front*: a convolution over {KERNEL} tokens before every attention layer (Canon layers)."
            )
        if "conv" in mixers:
            identity = "; it starts at random, *from identity* as a layer that passes its input on"
            any_identity = any(each.words["start"] == "from identity" for each in self.arms)
            notes.append(f"*gated conv*: the short convolution of LFM2{identity if any_identity else ''}.")
        return " ".join(notes)

    def _gates(self) -> list[str]:
        """The gates of KA: how many there are and where they start, as far as labels are silent."""
        kinds = {"gate per head": "a learned gate for each head", "gate per token": "a learned gate for each token"}
        kind = kinds.get(self.unsaid["gate"])
        if kind is None:
            return ["Gates of KA are fixed at 1 unless a label says otherwise; learned ones start at 0.5."]
        start = self.shared.get("start", "").removeprefix("gates from ") or "0.5"
        unless = "" if {"gate", "start"} <= set(self.shared) else " unless a label says otherwise"
        return [f"KA has {kind}, which starts at {start}{unless}."]


def _has(each: HybridArm, key: str) -> bool:
    return key in OF_ALL or each.mixer == "ka"
