"""From stored images to batches of augmented pixels: the decoder, its kernels, the colours."""
