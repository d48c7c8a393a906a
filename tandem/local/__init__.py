"""The whole system on one machine, without Docker: what `tandem up` starts, finds and stops."""
