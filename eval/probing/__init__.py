"""Linear probe on freshly augmented images."""
