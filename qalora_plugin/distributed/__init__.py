"""Several processes that train together: what one of them does alone, and sharded tensors."""
