"""Methods that compare relations between the images of a batch."""
