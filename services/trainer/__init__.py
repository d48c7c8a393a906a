"""The trainer: a Celery worker that runs training jobs and writes checkpoints to the shared volume."""
