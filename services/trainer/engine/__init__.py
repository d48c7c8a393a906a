"""The training loops: they compute and yield facts; their caller saves, logs and reports. No broker, no files."""
