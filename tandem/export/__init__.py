"""A checkpoint as a file that other programs run: ONNX or torch.export, checked on real images before it is there.

`request`, `sources` and `process` are free of torch: the command line uses them, and the work is done in a process of
its own (`python -m tandem.export`).
"""
