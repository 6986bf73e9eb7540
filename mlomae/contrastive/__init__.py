"""MAE-CT: contrastive tuning of a pretrained masked autoencoder, in three steps."""
