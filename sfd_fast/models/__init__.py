"""The networks: velocity model, semantic and texture autoencoders, frozen vision encoders, one attention function."""
