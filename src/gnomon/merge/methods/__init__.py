"""The merge methods, one file each; every file here is found by itself (registry.methods)."""
