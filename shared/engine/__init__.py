"""What page, programs and command line talk to: one queue, one worker, one set of models and pictures."""
