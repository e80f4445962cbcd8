"""A softmax model becomes a KA model: its gates rise from 0 to 1 while it trains on.

python examples/convert_model.py FOLDER_OF_A_MODEL my_text.txt --out converted
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from ka_attention.conversion.raising import Conversion, convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name of a softmax model, with its tokenizer")
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("runs/example-converted"))
    given = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(given.model)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    ids = tokenizer(given.text.read_text(encoding="utf-8"), return_tensors="pt", truncation=False)["input_ids"][0]
    cut = ids[: len(ids) // given.length * given.length].view(-1, given.length)
    sequences = [{"input_ids": part, "labels": part} for part in cut]

    plan = Conversion(steps=given.steps, learning_rate=1e-4)
    for row in convert(model, sequences, plan, given.out / "checkpoints", seed=0, evaluations=4):
        print(f"step {row['step']:5}: gate {row['gate']:.2f}")
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    print(f"A KA model: {given.out}")


if __name__ == "__main__":
    main()
