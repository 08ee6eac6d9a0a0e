"""`hf-trainopt plan`: models from a command line, tables and pictures of plans."""
