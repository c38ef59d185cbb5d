"""What is learnt: one file per piece of mathematics, each part carrying its own loss."""
