"""A run from its beginning to its end: prepare, walk over the blocks, recover the whole, save, measure."""
