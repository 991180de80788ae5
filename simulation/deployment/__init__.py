"""A server for real devices: who may join, the door they come to, what is asked of them, what it becomes."""
