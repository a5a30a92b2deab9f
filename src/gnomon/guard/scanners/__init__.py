"""The built-in scanners, one file each. A new one is a file here; nothing else changes."""
