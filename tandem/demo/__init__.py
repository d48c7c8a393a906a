"""The demonstration: the whole path on real data that comes with the installed packages, or on a person's own."""
