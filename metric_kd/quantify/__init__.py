"""What distillation taught a network: information discarding, concepts, and how they were learned."""
