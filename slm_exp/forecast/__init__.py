"""What a run would do and cost, without weights and without torch: behind `slm plan`."""
