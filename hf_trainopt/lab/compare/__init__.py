"""`hf-trainopt compare`: a training script under stock settings and under ours, paired over seeds; docs/compare.md."""
