"""Code that is copied beside the weights of checkpoints that need it."""
