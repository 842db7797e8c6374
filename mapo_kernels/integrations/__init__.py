"""The package in the trainers people use; each module needs its trainer, this one needs nothing."""
