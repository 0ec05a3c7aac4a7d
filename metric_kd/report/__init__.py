"""What people look at: one HTML page per comparison, with everything that it shows inside it."""
