"""What all programs share: job, engines, loop, monitoring."""
