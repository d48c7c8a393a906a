"""The inference service: a gRPC server that answers Classify, Compare and Generate."""
