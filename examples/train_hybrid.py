"""A small Qwen3 whose layers are narrow KA layers but for every fourth, trained with transformers' own Trainer.

python examples/train_hybrid.py                # this package's source as text, a minute or two on a CPU
python examples/train_hybrid.py my_text.txt --steps 2000 --out my_model
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Trainer, TrainingArguments

import ka_attention
from ka_attention.hf import KAConfig, attach, cache_bytes, register


def byte_sequences(text: str, length: int) -> list[dict[str, torch.Tensor]]:
    """The text as bytes, in sequences of equal length: a tokenizer that needs no download."""
    ids = torch.tensor(list(text.encode()))
    return [{"input_ids": part, "labels": part} for part in ids[: len(ids) // length * length].view(-1, length)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=Path, help="a text file; by default this package's source")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--out", type=Path, default=Path("runs/example-hybrid"))
    given = parser.parse_args()
    files = [given.text] if given.text else sorted(Path(ka_attention.__file__).parent.rglob("*.py"))
    data = byte_sequences("".join(file.read_text(encoding="utf-8") for file in files), given.length)

    config = Qwen3Config(  # with norms on queries and keys, which a Llama has none of
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
    )
    model = attach(
        AutoModelForCausalLM.from_config(config),
        # three KA layers, then one of full attention; with what helped hybrids most
        KAConfig(pattern="3:1", window=4, gate="head", gate_init=0.0, output_gate=True, convolution=4),
    )
    arguments = TrainingArguments(
        output_dir=str(given.out / "checkpoints"),
        max_steps=given.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        logging_steps=max(1, given.steps // 5),
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    Trainer(model, arguments, train_dataset=data).train()
    model.save_pretrained(given.out)

    register()  # makes the saved type known to the Auto classes of a new process
    again = AutoModelForCausalLM.from_pretrained(given.out)
    prompt = torch.tensor([list(b"def ")])
    answer = again.generate(prompt, max_new_tokens=40, do_sample=False, return_dict_in_generate=True)
    print(bytes(answer.sequences[0].tolist()).decode(errors="replace"))
    print(f"cache of {answer.sequences.shape[1]} tokens: {cache_bytes(answer.past_key_values):,} bytes")


if __name__ == "__main__":
    main()
