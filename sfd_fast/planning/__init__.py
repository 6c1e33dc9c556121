"""What a run would need before it runs: memory, a lower bound of its time, a description."""
