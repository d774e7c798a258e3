"""Complete runs as Python functions: parts, data, loop, measures, files, in plain sight."""
