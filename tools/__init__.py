"""What the house is kept with; not shipped."""
