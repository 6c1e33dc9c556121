"""What SFD computes apart from networks: clocks, masks, losses, noise, statistics of latents."""
