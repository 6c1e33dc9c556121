"""Caches on disk: shards, their tensors, manifest, and copies of remote ones."""
