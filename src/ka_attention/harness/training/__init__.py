"""Training from scratch and afterwards, and what a trained model gives."""
