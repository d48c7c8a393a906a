"""The Open Inference Protocol, version 2: what public clients call on the port of tandem.v1."""
