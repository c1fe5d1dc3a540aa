"""Where runs are tracked besides their own record."""
