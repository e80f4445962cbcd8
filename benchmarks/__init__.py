"""Times of the operator beside those of its peers, taken in turns in one run."""
