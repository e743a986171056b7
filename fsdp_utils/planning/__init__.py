"""What a run will take before anything is loaded: memory, host memory, disk, steps and time, for cards that may not be
here."""
