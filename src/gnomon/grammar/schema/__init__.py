"""The schema compiler: JSON Schema in; a mask grammar, validators for what the mask cannot say, and a report out."""
