"""Running decoder layers: blocks without model copies, gradients, head losses, ridge regression, progress."""
