"""A saved folder answers questions, and its answers are scored."""
