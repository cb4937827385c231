"""What every domain of images stands on: timm backbones with their roles, and the starter checkpoints among them."""
