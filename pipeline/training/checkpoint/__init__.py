"""What a run saves: checkpoints of a completed step, and what is trained, each whole or not there."""
