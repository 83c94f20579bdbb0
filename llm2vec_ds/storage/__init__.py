"""How files and folders are written so that no work is lost: one lock, one folder that is replaced whole."""
