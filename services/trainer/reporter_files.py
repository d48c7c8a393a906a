"""Names of what a training process leaves in its run directory; apart, so that the supervisor imports no torch."""

STATUS_FILE = "status.json"
LOG_FILE = "log.txt"
