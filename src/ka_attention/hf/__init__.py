"""KA-attention in Hugging Face transformers: attention function, masks, caches, gates."""
