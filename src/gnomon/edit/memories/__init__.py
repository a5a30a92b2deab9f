"""Ways of remembering, one file each; see remembering.py."""
