"""Generated protobuf code (`v1`, made by `make proto`) and the conversions to and from it."""
