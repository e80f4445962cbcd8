"""What studies share: data, tokenizers, settings, training, the store of a run, statistics."""
