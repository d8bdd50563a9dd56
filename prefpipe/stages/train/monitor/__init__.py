"""What is watched while a policy trains: diagnostics, alerts, trackers."""
