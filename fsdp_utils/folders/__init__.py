"""What lies in a saved folder: its names, how it is written, how it is recognised."""
