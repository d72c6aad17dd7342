"""The worker process: RQ's jobs, the relay and the sweeper."""
