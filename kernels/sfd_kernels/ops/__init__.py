"""One file per operator: what it computes, its reference in plain PyTorch, example inputs, least bytes and flops."""
