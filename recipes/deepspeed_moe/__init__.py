"""A mixture-of-experts language model trained by DeepSpeed, its experts in FP8 or BF16."""
