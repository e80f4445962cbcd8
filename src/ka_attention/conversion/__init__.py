"""How a softmax model becomes a KA model: gates raised in training, adapters fitted."""
