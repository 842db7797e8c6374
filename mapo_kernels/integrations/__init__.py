"""What trainers load; each module names the trainer it serves.

`verl`, `slime` and `prime_rl` import their trainers inside calls. `trl` imports TRL when it is
imported, because its classes are subclasses of TRL's; `fused_forward` imports transformers.
"""
