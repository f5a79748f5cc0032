"""Expert shards: the slots they hold, the grouped SwiGLU over them, and the loop that serves lanes."""
