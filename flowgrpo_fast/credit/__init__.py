"""Credit: scores -> advantages, by a chain of small steps applied from left to right."""
