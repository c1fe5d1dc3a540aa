"""Methods decide which layers go; they return a plan and never touch weights."""
