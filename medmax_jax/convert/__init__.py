"""Checkpoints in and out: Meta, Hugging Face, PEFT and this project's own layout."""
