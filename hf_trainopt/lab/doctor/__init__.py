"""What each part will do in a run, found by starting the run and stopping before its first step."""
