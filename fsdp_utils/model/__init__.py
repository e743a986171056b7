"""From a folder of weights to a model whose rows are loaded where they belong."""
