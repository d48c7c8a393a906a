"""Generated from proto/tandem/v1 by `make proto`; never edited by hand."""
