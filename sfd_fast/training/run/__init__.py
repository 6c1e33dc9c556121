"""What a run leaves beside its weights: directory, log, pictures, traces; and how it is stopped."""
