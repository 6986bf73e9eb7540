"""From encoded images to batches of augmented pixels."""
