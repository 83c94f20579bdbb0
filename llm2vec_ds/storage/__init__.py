"""Writes files and folders so that no work is lost: locks, durable files, folders replaced as a whole."""
