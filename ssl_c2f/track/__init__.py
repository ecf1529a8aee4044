"""Records of a run: metrics.jsonl, and the same records to W&B."""
