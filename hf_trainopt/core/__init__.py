"""What every part builds on: the protocol of a part, facts about a run, the checkpoint file."""
