"""Fast paths. Each stands beside the plain torch version that defines it, and is tested against it."""
