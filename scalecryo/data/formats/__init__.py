"""Files of other programs: tables, stacks, poses, structures."""
