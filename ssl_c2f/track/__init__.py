"""Records of a run: metrics.jsonl, and the same records to W&B."""

AXES = ("flops", "samples", "train_seconds", "tokens")  # what a run has spent so far: metrics are drawn against these
