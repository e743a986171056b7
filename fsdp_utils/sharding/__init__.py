"""Who holds which rows, and how whole weights and activations come and go."""
