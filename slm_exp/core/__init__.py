"""Types, errors, files, registry, stage cache, runtime: what everything stands on."""
