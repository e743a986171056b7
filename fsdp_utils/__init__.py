"""What every script shares: flags, processes, loading, sharding, data, optimizers, checkpoints and metrics."""
