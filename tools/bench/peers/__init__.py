"""Other stacks on the job of job.py; each prints one JSON line."""
