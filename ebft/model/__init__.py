"""Models: loading, tensors in shards, the decoder and its blocks, stand-ins by shape, fused layers of families."""
