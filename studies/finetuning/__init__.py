"""The study of fine-tuning."""
