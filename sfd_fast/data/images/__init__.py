"""Images: where they come from, which are readable, and how they are decoded."""
