"""What run.py uses: the commands demo and edit."""
