"""Pretrains a small mixture-of-experts language model in FP8 beside its BF16 twin."""
