"""Methods of personalisation compared on tasks with a history per person."""
