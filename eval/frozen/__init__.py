"""What evaluations of frozen features share."""
