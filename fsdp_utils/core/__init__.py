"""The ground floor: it knows no model, and everything may use it."""
