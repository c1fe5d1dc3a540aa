"""The commands: `slm COMMAND`, and `slm-exp`, the run itself."""
