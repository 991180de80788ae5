"""A server for real devices: who may join, how they connect, what is asked of them, what it becomes."""
