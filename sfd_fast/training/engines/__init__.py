"""Engines behind the training loop: plain torch, and DeepSpeed."""
