"""The `tandem` command, one module for each noun. It imports no torch, and each noun only when it is used."""
