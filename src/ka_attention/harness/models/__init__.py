"""Models of a comparison: arms, saved models, mixers, and the passes of a model that trains."""
