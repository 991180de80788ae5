"""What may leave a device, and at what price. Imports nothing of the other packages."""
