"""One backend per file: which parameters replace a weight, how rows become them, and how they become rows again."""
