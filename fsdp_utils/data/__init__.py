"""From a dataset's name or a file to micro-batches: a pure function of seed, epoch and step."""
