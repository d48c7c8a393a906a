"""Text from a language model of the volume on this machine, without a server: what `tandem generate --local` runs.

`prompts`, `request` and `process` are free of torch: the command line uses them, and the work is done in a process of
its own (`python -m tandem.generation`).
"""
