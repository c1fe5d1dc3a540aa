"""What a run would do and cost, told without weights and without torch: behind `slm plan`."""
