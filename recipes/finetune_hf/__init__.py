"""Fine-tunes a Hugging Face mixture-of-experts model with FP8 experts and the Trainer."""
