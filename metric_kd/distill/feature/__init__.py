"""Methods that compare feature maps or features, image by image."""
