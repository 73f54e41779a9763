"""What a slice or a GPU server needs, compiled without one."""
