"""What `run_clm.py` and `run_image.py` need besides the Trainer: flags, data, augmentation, metrics, a last table."""
