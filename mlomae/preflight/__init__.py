"""`python -m mlomae preflight`: the hosts of a launch, looked at before it starts."""
