"""What trainers load: each module names the trainer it serves, and imports it only when called."""
