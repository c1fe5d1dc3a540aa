"""What tests are made of: models, tasks, runs, records. One builder of each kind, and every test uses it."""
