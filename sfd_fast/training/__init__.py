"""Training: one loop over an engine (torch or DeepSpeed), an optimizer that carries the EMA, exact checkpoints."""
