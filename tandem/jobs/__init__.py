"""What a run is: its spec, its record and state machine, its events, and the way to the queue."""
