"""What a step holds in GPU memory, and what follows from that."""
