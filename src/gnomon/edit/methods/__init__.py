"""Methods of editing, one file each; see registry.py."""
